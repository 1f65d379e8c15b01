#include "core/layer.h"

#include <cstddef>
#include <cstdint>

#include "core/registry.h"

namespace msa {
namespace {

Status run_steps(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  const LayerSteps steps = layer_steps(plan, params.as<LayerParams>(), workspace);
  MSA_TRY(run_checked(steps.select_plan, steps.select, steps.workspace, queue));
  return run_checked(steps.attend_plan, steps.attend, steps.workspace, queue);
}

}  // namespace

int64_t layer_ids_bytes(const Problem& problem, const Limits& limits) {
  constexpr int64_t kAlignment = 256;  // of a workspace on any device
  const int64_t bytes =
      problem.heads_kv * limits.max_tokens * problem.topk * static_cast<int64_t>(sizeof(int32_t));
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

const Kernel kLayerSteps = {.op = Op::kLayer,
                            .name = "index_select, sparse_attention",
                            .workspace_bytes = layer_ids_bytes,
                            .run = run_steps,
                            .steps = kLayerOps};

LayerSteps layer_steps(const Plan& plan, const LayerParams& a, Workspace workspace) {
  const Problem& p = plan.problem;
  TensorView ids = a.block_ids;
  if (!ids.given()) {
    ids = TensorView::contiguous(workspace.data, DType::kI32, {p.heads_kv, a.q.shape[0], p.topk});
    ids.device = p.device;
  }
  const auto taken = static_cast<size_t>(layer_ids_bytes(p, plan.limits));
  LayerSteps steps{
      .select = {.q_idx = a.q_idx, .k_idx = a.k_idx, .batch = a.batch, .block_ids = ids},
      .attend = {.q = a.q,
                 .k = a.k,
                 .v = a.v,
                 .block_ids = ids,
                 .batch = a.batch,
                 .softmax_scale = a.softmax_scale,
                 .o = a.o,
                 .lse = a.lse},
      .workspace = {static_cast<std::byte*>(workspace.data) + taken, workspace.bytes - taken}};
  bind(*plan.backend, step_problem(p, Op::kIndexSelect), plan.limits, &steps.select_plan);
  bind(*plan.backend, step_problem(p, Op::kSparseAttention), plan.limits, &steps.attend_plan);
  return steps;
}

}  // namespace msa
