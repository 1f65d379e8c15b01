#include "core/registry.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>
#include <thread>

#include "core/check.h"
#include "core/text.h"

namespace msa {
namespace {

std::string known_names() {
  std::string names;
  for (const Backend* backend : backends())
    names += (names.empty() ? "" : ", ") + std::string(backend->name());
  return names;
}

/// Ok when `backend` can serve `problem` now.
Status suits(const Backend& backend, const Problem& problem) {
  if (backend.device() != problem.device.kind) {
    return error(StatusCode::kUnsupported, "works on ",
                 backend.device() == DeviceKind::kCPU ? "CPU" : "CUDA",
                 " memory, the problem's tensors are elsewhere");
  }
  MSA_TRY(backend.usable());
  return backend.supports(problem);
}

template <class Params>
Status checked_run(const Plan& plan, const Params& params, Workspace workspace, Queue queue) {
  if (plan.backend == nullptr)
    return invalid("plan: got an empty plan, expected one made by msa::plan");
  if (static_cast<int64_t>(workspace.bytes) < plan.workspace_bytes ||
      (workspace.data == nullptr && plan.workspace_bytes > 0)) {
    return invalid("workspace: got ", workspace.data == nullptr ? 0 : workspace.bytes,
                   " bytes, the plan needs ", plan.workspace_bytes);
  }
  if (reinterpret_cast<uintptr_t>(workspace.data) % 64 != 0) {
    return invalid("workspace: the address must be a multiple of 64 bytes");
  }
  MSA_TRY(check(plan, params));
  return plan.backend->run(plan, params, workspace, queue);
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
    std::stable_sort(all.begin(), all.end(), [](const Backend* a, const Backend* b) {
      return a->priority() > b->priority();
    });
    return all;
  }();
  return list;
}

const Backend* find_backend(std::string_view name) {
  for (const Backend* backend : backends()) {
    if (name == backend->name()) return backend;
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
    reasons +=
        (reasons.empty() ? "" : "; ") + std::string(backend->name()) + ": " + status.message();
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
  made.workspace_bytes = made.backend->workspace_bytes(problem, made.limits);
  *out = made;
  return {};
}

Status run(const Plan& p, const IndexScoresParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const SelectBlocksParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const IndexSelectParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const SparseAttentionParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const DenseAttentionParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const MergeParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const BlockListsParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const AppendPagedParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const BlockMassParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const LayerDecodeParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const AttentionBackwardParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const IndexLseParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}
Status run(const Plan& p, const KlParams& a, Workspace w, Queue q) {
  return checked_run(p, a, w, q);
}

}  // namespace msa
