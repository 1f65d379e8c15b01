#include "core/layer_decode.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace msa {
namespace {

Problem part(Problem problem, Op op) {
  problem.op = op;
  return problem;
}

Plan part(const Plan& plan, Op op) {
  Plan made = plan;
  made.problem.op = op;
  made.workspace_bytes = plan.backend->workspace_bytes(made.problem, plan.limits);
  return made;
}

int64_t ids_bytes(const Problem& problem, int64_t tokens) {
  constexpr int64_t kAlignment = 256;  // of a workspace on any device
  const int64_t bytes =
      problem.heads_kv * tokens * problem.topk * static_cast<int64_t>(sizeof(int32_t));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

Status supports_layer_decode(const Backend& backend, const Problem& problem) {
  MSA_TRY(backend.supports(part(problem, Op::kIndexSelect)));
  return backend.supports(part(problem, Op::kSparseDecode));
}

int64_t layer_decode_bytes(const Backend& backend, const Problem& problem, const Limits& limits) {
  return ids_bytes(problem, limits.max_tokens) +
         std::max(backend.workspace_bytes(part(problem, Op::kIndexSelect), limits),
                  backend.workspace_bytes(part(problem, Op::kSparseDecode), limits));
}

LayerDecodeSteps layer_decode_steps(const Plan& plan, const LayerDecodeParams& a,
                                    Workspace workspace) {
  const Problem& p = plan.problem;
  TensorView ids = a.ids;
  if (!ids.given()) {
    ids = TensorView::contiguous(workspace.data, DType::kI32, {p.heads_kv, a.q.shape[0], p.topk});
    ids.device = p.device;
  }
  const auto taken = static_cast<size_t>(ids_bytes(p, plan.limits.max_tokens));
  return {.select_plan = part(plan, Op::kIndexSelect),
          .attend_plan = part(plan, Op::kSparseDecode),
          .select = {.q_idx = a.q_idx, .k_idx = a.k_idx, .batch = a.batch, .ids = ids},
          .attend = {.q = a.q,
                     .k = a.k,
                     .v = a.v,
                     .ids = ids,
                     .batch = a.batch,
                     .softmax_scale = a.softmax_scale,
                     .o = a.o,
                     .lse = a.lse},
          .workspace = {static_cast<std::byte*>(workspace.data) + taken, workspace.bytes - taken}};
}

Status Backend::run(const Plan& plan, const LayerDecodeParams& a, Workspace w, Queue q) const {
  const LayerDecodeSteps steps = layer_decode_steps(plan, a, w);
  MSA_TRY(run(steps.select_plan, steps.select, steps.workspace, q));
  return run(steps.attend_plan, steps.attend, steps.workspace, q);
}

}  // namespace msa
