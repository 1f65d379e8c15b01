#include "cuda/sm90/decode/family.h"

#include "core/layer.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/decode/attend.cuh"
#include "cuda/sm90/decode/choose_blocks.cuh"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/score_pages.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::decode {
namespace {

Status score_arguments(const Plan& plan, const IndexSelectParams& params, Workspace workspace,
                       ScoreArguments* a) {
  a->heads = plan.problem.heads_kv;
  a->group_tokens = kRows / a->heads;
  MSA_TRY(map_queries("q_idx", params.q_idx, static_cast<uint32_t>(a->heads),
                      static_cast<uint32_t>(a->group_tokens), &a->q));
  MSA_TRY(map_keys("k_idx", params.k_idx, KvLayout::kPaged, kBlock, &a->k));
  a->batch = device_batch(params.batch, params.q_idx.shape[0], params.k_idx, kBlock);
  a->scores = static_cast<float*>(workspace.data);
  a->columns = score_columns(plan.limits.max_seqlen_k);
  return {};
}

Status launch_score(const Plan& plan, const ScoreArguments& a, cudaStream_t stream) {
  const auto groups = static_cast<uint32_t>(ceil_div(plan.limits.max_seqlen_q, a.group_tokens));
  return launch(
      "decode scores", score,
      {.grid = dim3(kSMs, groups), .block = kThreads, .shared_bytes = sizeof(ScoreShared)}, stream,
      a);
}

Status attend_arguments(const Problem& problem, const SparseAttentionParams& params,
                        AttendArguments* a) {
  const auto group = static_cast<uint32_t>(problem.group());
  MSA_TRY(map_queries("q", params.q, group, 1, &a->q));
  MSA_TRY(map_keys("k", params.k, KvLayout::kPaged, kBlock, &a->k));
  MSA_TRY(map_keys("v", params.v, KvLayout::kPaged, kBlock, &a->v));
  a->batch = device_batch(params.batch, params.q.shape[0], params.k, kBlock);
  a->ids = rows<int32_t>(params.block_ids, 1);
  a->selection = selection_of(problem);
  a->group = problem.group();
  a->scale = softmax_scale(params.softmax_scale, kDim) * kLog2E;
  a->o = rows<void>(params.o);
  a->o_is_f32 = params.o.dtype == DType::kF32;
  a->lse = rows<float>(params.lse);
  return {};
}

template <bool kChoose>
Status launch_attend(const Problem& problem, const AttendArguments& a, cudaStream_t stream) {
  const auto tokens = static_cast<uint32_t>(a.batch.tokens);
  const auto heads = static_cast<uint32_t>(problem.heads_kv);
  const uint32_t cluster = cluster_size(tokens, heads);
  return launch("decode attention", attend<kChoose>,
                {.grid = dim3(cluster * tokens, heads),
                 .block = kThreads,
                 .shared_bytes = sizeof(AttendShared),
                 .overlap = kChoose,
                 .cluster = cluster},
                stream, a);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  return limits.max_tokens * problem.heads_kv * score_columns(limits.max_seqlen_k) *
         static_cast<int64_t>(sizeof(float));
}

Status run(const Plan& plan, const IndexSelectParams& params, Workspace workspace,
           cudaStream_t stream) {
  ScoreArguments s{};
  MSA_TRY(score_arguments(plan, params, workspace, &s));
  ChooseArguments c{};
  c.batch = s.batch;
  c.scores = s.scores;
  c.columns = s.columns;
  c.selection = selection_of(plan.problem);
  c.ids = rows<int32_t>(params.block_ids, 1);
  c.ids_scores = rows<float>(params.scores, 1);
  MSA_TRY(launch_score(plan, s, stream));
  return launch(
      "decode choice", choose,
      {.grid = dim3(static_cast<uint32_t>(s.batch.tokens), static_cast<uint32_t>(s.heads)),
       .block = kConsumers,
       .overlap = true},
      stream, c);
}

Status run(const Plan& plan, const SparseAttentionParams& params, Workspace, Stream stream) {
  AttendArguments a{};
  MSA_TRY(attend_arguments(plan.problem, params, &a));
  return launch_attend<false>(plan.problem, a, stream);
}

Status run(const Plan& plan, const LayerParams& params, Workspace workspace, Stream stream) {
  const LayerSteps steps = layer_steps(plan, params, workspace);
  const Problem& problem = plan.problem;
  ScoreArguments s{};
  AttendArguments a{};
  MSA_TRY(score_arguments(plan, steps.select, steps.workspace, &s));
  MSA_TRY(attend_arguments(problem, steps.attend, &a));
  a.scores = s.scores;
  a.columns = s.columns;
  MSA_TRY(launch_score(plan, s, stream));
  return launch_attend<true>(problem, a, stream);
}

std::span<const Kernel> kernels() {
  static constexpr Kernel kAll[] = {
      tuned<IndexSelectParams, fits_index, takes, run>(Op::kIndexSelect, "sm90/decode",
                                                       workspace_bytes),
      tuned<SparseAttentionParams, fits, takes, run>(Op::kSparseAttention, "sm90/decode", nullptr),
      tuned<LayerParams, fits_layer, takes, run>(Op::kLayer, "sm90/decode", layer_ids_bytes,
                                                 kLayerOps)};
  return kAll;
}

}  // namespace msa::cuda::sm90::decode
