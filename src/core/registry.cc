#include "core/registry.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <thread>

#include "core/check.h"
#include "core/op_table.h"
#include "core/text.h"

namespace msa {
namespace {

constexpr const char* kOtherOps = "other operators";

std::string known_names() {
  std::string names;
  for (const Backend* backend : backends())
    names += (names.empty() ? "" : ", ") + std::string(backend->name);
  return names;
}

/// Ok when `backend` can serve `problem` now.
Status suits(const Backend& backend, const Problem& problem) {
  if (backend.device != problem.device.kind) {
    return error(StatusCode::kUnsupported, "works on ",
                 backend.device == DeviceKind::kCPU ? "CPU" : "CUDA",
                 " memory, the problem's tensors are elsewhere");
  }
  MSA_TRY(backend.usable());
  return backend.supports(problem);
}

}  // namespace

std::span<const Backend* const> backends() {
  static const auto list = [] {
    std::array all = {
#if MSA_WITH_CUDA
        cuda_backend(),      cuda_plain_backend(),    cuda_union_backend(), cuda_kv_outer_backend(),
#endif
#if MSA_WITH_X86
        amx_backend(),       avx512_backend(),        avx2_backend(),
#endif
        reference_backend(), reference_f64_backend(),
    };
    std::stable_sort(all.begin(), all.end(),
                     [](const Backend* a, const Backend* b) { return a->priority > b->priority; });
    return all;
  }();
  return list;
}

const Backend* find_backend(std::string_view name) {
  for (const Backend* backend : backends()) {
    if (name == backend->name) return backend;
  }
  return nullptr;
}

Status choose_backend(const Problem& problem, std::string_view name, const Backend** out) {
  std::string_view source = "backend";
  if (name.empty() || name == "auto") {
    const char* forced = std::getenv("MSA_BACKEND");
    name = forced != nullptr && *forced != '\0' ? forced : "auto";
    source = "MSA_BACKEND";
  }
  if (name != "auto") {
    const Backend* backend = find_backend(name);
    if (backend == nullptr)
      return invalid(source, ": got \"", name, "\", expected auto, ", known_names());
    if (Status status = suits(*backend, problem); !status) {
      return error(status.code(), "backend ", name, ": ", status.message());
    }
    *out = backend;
    return {};
  }
  std::string reasons;
  for (const Backend* backend : backends()) {
    const Status status = suits(*backend, problem);
    if (status) {
      *out = backend;
      return {};
    }
    reasons += (reasons.empty() ? "" : "; ") + std::string(backend->name) + ": " + status.message();
  }
  return error(StatusCode::kUnsupported, "no backend can compute ", name_of(problem.op),
               " here: ", reasons);
}

Status plan(const Problem& problem, const Limits& limits, Plan* out, std::string_view backend) {
  MSA_TRY(validate(problem));
  MSA_TRY(validate(limits));
  Plan made{.problem = problem, .limits = limits};
  if (limits.max_threads == 0) {
    made.limits.max_threads =
        static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
  }
  MSA_TRY(choose_backend(problem, backend, &made.backend));
  if (const Refusal refusal = bind(*made.backend, problem, made.limits, &made))
    return error(StatusCode::kUnsupported, "backend ", made.backend->name, ": ", refusal.text());
  *out = made;
  return {};
}

Status run(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  if (plan.backend == nullptr)
    return invalid("plan: got an empty plan, expected one made by msa::plan");
  if (static_cast<int64_t>(workspace.bytes) < plan.workspace_bytes ||
      (workspace.data == nullptr && plan.workspace_bytes > 0)) {
    return invalid("workspace: got ", workspace.data == nullptr ? 0 : workspace.bytes,
                   " bytes, the plan needs ", plan.workspace_bytes);
  }
  const bool cuda = plan.problem.device.kind == DeviceKind::kCUDA;
  if (reinterpret_cast<uintptr_t>(workspace.data) % (cuda ? 256 : 64) != 0)
    return invalid("workspace: the address must be a multiple of ", cuda ? 256 : 64, " bytes");
  MSA_TRY(check(plan, params));
  return run_checked(plan, params, workspace, queue);
}

// ---- plans and kernels --------------------------------------------------------------------------

std::string Refusal::text() const {
  return msa::text(field, ": got ", given != nullptr ? given : std::to_string(value),
                   ", supported: ", supported);
}

Status Backend::supports(const Problem& problem, const Limits& limits) const {
  Kernels found;
  const Refusal refusal = find_kernels(*this, problem, limits, &found);
  if (refusal.supported == kOtherOps) {
    std::string known;
    for (const OpInfo& info : all_ops())
      if (std::any_of(kernels.begin(), kernels.end(),
                      [&](const Kernel& kernel) { return kernel.op == info.op; }))
        known += (known.empty() ? "" : ", ") + std::string(info.name);
    return error(StatusCode::kUnsupported, "op: got ", name_of(problem.op), ", supported: ", known);
  }
  return refusal ? error(StatusCode::kUnsupported, refusal.text()) : Status();
}

Problem step_problem(Problem problem, Op step) {
  problem.op = step;
  return problem;
}

Refusal find_kernels(const Backend& backend, const Problem& problem, const Limits& limits,
                     Kernels* out) {
  *out = {};
  Refusal last{.field = "op", .given = name_of(problem.op), .supported = kOtherOps};
  size_t count = 0;
  for (const Kernel& kernel : backend.kernels) {
    if (kernel.op != problem.op) continue;
    last = kernel.fits != nullptr ? kernel.fits(problem, limits) : Refusal{};
    for (const Op step : kernel.steps) {
      Kernels found;
      if (!last) last = find_kernels(backend, step_problem(problem, step), limits, &found);
    }
    if (!last && count < out->size()) (*out)[count++] = &kernel;
  }
  return count > 0 ? Refusal{} : last;
}

Refusal bind(const Backend& backend, const Problem& problem, const Limits& limits, Plan* out) {
  *out = {.backend = &backend, .problem = problem, .limits = limits};
  const Refusal refusal = find_kernels(backend, problem, limits, &out->kernels);
  for (const Kernel* kernel : out->kernels) {
    if (kernel == nullptr) break;
    int64_t of_steps = 0;
    for (const Op step : kernel->steps) {
      Plan made;
      bind(backend, step_problem(problem, step), limits, &made);
      of_steps = std::max(of_steps, made.workspace_bytes);
    }
    const int64_t own =
        kernel->workspace_bytes != nullptr ? kernel->workspace_bytes(problem, limits) : 0;
    out->workspace_bytes = std::max(out->workspace_bytes, own + of_steps);
  }
  return refusal;
}

const Kernel* kernel_of(const Plan& plan, const ParamsRef& params, std::string* reasons) {
  for (const Kernel* kernel : plan.kernels) {
    if (kernel == nullptr) break;
    const Refusal refusal = kernel->takes != nullptr ? kernel->takes(plan, params) : Refusal{};
    if (!refusal) return kernel;
    if (reasons != nullptr)
      *reasons += (reasons->empty() ? "" : "; ") + text(kernel->name, ": ", refusal.text());
  }
  return nullptr;
}

Status run_checked(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  if (const Kernel* kernel = kernel_of(plan, params))
    return kernel->run(plan, params, workspace, queue);
  std::string reasons;
  kernel_of(plan, params, &reasons);
  return error(StatusCode::kUnsupported, reasons);
}

const char* Plan::kernel() const { return kernels[0] != nullptr ? kernels[0]->name : ""; }

}  // namespace msa
