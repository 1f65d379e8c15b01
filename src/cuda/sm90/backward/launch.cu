#include "cuda/sm90/backward/family.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/backward/key_gradient.cuh"
#include "cuda/sm90/backward/prepare.cuh"
#include "cuda/sm90/backward/query_gradient.h"
#include "cuda/sm90/walk/launch_tasks.cuh"
#include "cuda/smxx/plain.h"
#include "cuda/softmax_scale.h"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::backward {
namespace {

bool is_sparse(const Problem& problem) { return problem.op == Op::kSparseAttentionBackward; }

/// Parts of the workspace: their first bytes.
struct Layout {
  walk::TaskLayout tasks;
  int64_t words;         ///< Words
  int64_t row_ptr;       ///< i32 [Hkv,rows+1]
  int64_t entries;       ///< i32 [Hkv,T*K]
  int64_t row_terms;     ///< f32 [T,Hkv,2,G]
  int64_t dk_parts;      ///< f32 [parts,128,128]
  int64_t dv_parts;      ///< likewise
  int64_t list_scratch;  ///< of block_lists; the parts are written later, over it
  int64_t bytes;         ///< of all
};

Layout layout(const Problem& problem, const Limits& limits) {
  Layout l{};
  l.tasks = walk::task_layout(problem, limits, is_sparse(problem), 0);
  Placement at(l.tasks.end);
  l.words = at.place(sizeof(Words));
  const int64_t entries = is_sparse(problem) ? limits.max_tokens * problem.topk : 0;
  l.row_ptr = at.place(problem.heads_kv * (l.tasks.rows + 1) * 4);
  l.entries = at.place(problem.heads_kv * entries * 4);
  l.row_terms = at.place(limits.max_tokens * problem.heads_q * 2 * 4);
  l.list_scratch = at.end();
  const int64_t scratch = is_sparse(problem) ? plain::block_lists_bytes(problem, limits) : 0;
  const int64_t part_bytes = l.tasks.parts * kBlock * kDim * 4;
  l.dk_parts = at.place(part_bytes);
  l.dv_parts = at.place(part_bytes);
  l.bytes = std::max(at.end(), l.list_scratch + scratch);
  return l;
}

/// What the steps need of a call.
struct Call {
  Maps maps;
  DeviceBatch batch;
  walk::InverseLists lists;
  walk::TaskLists tasks;
  Layout layout;
  std::byte* workspace;
  float scale;
  uint32_t sms;

  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(workspace + offset);
  }
};

Status make_call(const Plan& plan, const AttentionBackwardParams& a, Workspace workspace,
                 Call* call) {
  const Problem& problem = plan.problem;
  const auto group = static_cast<uint32_t>(problem.group());
  MSA_TRY(map_queries("q", a.q, group, 1, &call->maps.q));
  MSA_TRY(map_queries("d_o", a.d_o, group, 1, &call->maps.d_o));
  MSA_TRY(map_keys("k", a.k, KvLayout::kPacked, kBlock, &call->maps.k));
  MSA_TRY(map_keys("v", a.v, KvLayout::kPacked, kBlock, &call->maps.v));
  call->batch = device_batch(a.batch, a.q.shape[0], a.k, kBlock);
  call->layout = layout(problem, plan.limits);
  call->workspace = static_cast<std::byte*>(workspace.data);
  call->tasks = walk::task_lists(call->layout.tasks, call->workspace);
  call->scale = softmax_scale(a.softmax_scale, kDim);
  const DeviceInfo* device = nullptr;
  MSA_TRY(device_info(problem.device.id, &device));
  call->sms = static_cast<uint32_t>(device->sms);
  return {};
}

/// The inverse lists of a call; none for dense.
Status make_lists(const Plan& plan, const AttentionBackwardParams& a, Call* call,
                  cudaStream_t stream) {
  if (!is_sparse(plan.problem)) return {};
  const Layout& l = call->layout;
  return walk::make_inverse_lists(
      plan,
      {.block_ids = a.block_ids, .batch = a.batch, .row_ptr = a.row_ptr, .entries = a.entries},
      {.rows = l.tasks.rows,
       .row_ptr = call->workspace + l.row_ptr,
       .entries = call->workspace + l.entries,
       .scratch = call->workspace + l.list_scratch},
      stream, &call->lists);
}

template <class O>
Status launch_prepare(const Plan& plan, const AttentionBackwardParams& a, const Call& call,
                      cudaStream_t stream) {
  return launch("attention_backward (delta)", prepare<O>,
                {.grid = static_cast<uint32_t>(a.q.shape[0]), .block = kPrepareThreads}, stream,
                PrepareArgs{.o = rows<const void>(a.o),
                            .d_o = rows<const __nv_bfloat16>(a.d_o),
                            .lse = rows<const float>(a.lse),
                            .row_terms = call.at<float>(call.layout.row_terms),
                            .words = call.at<Words>(call.layout.words),
                            .heads_q = plan.problem.heads_q,
                            .group = plan.problem.group()});
}

Status launch_tasks(const Plan& plan, const Call& call, cudaStream_t stream) {
  return walk::launch_make_tasks("attention_backward (tasks)",
                                 {.batch = call.batch,
                                  .lists = call.lists,
                                  .out = call.tasks,
                                  .heads_kv = plan.problem.heads_kv},
                                 stream);
}

template <int kGroup>
Status launch_key_gradient(const Plan& plan, const Call& call, cudaStream_t stream) {
  const Layout& l = call.layout;
  return launch(
      "attention_backward (keys)", key_gradient<kGroup>,
      {.grid = call.sms, .block = kThreads, .shared_bytes = sizeof(KeyGradientShared<kGroup>)},
      stream, call.maps,
      KeyGradientArgs{.tasks = call.tasks,
                      .lists = call.lists,
                      .row_terms = call.at<float>(l.row_terms),
                      .words = call.at<Words>(l.words),
                      .dk = call.at<float>(l.dk_parts),
                      .dv = call.at<float>(l.dv_parts),
                      .tokens = call.batch.tokens,
                      .heads_kv = plan.problem.heads_kv,
                      .scale = call.scale * kLog2E});
}

Status launch_reduce(const Call& call, const TensorView& out, int64_t parts, float scale,
                     cudaStream_t stream) {
  return walk::launch_reduce_parts("attention_backward (sum)",
                                   {.batch = call.batch,
                                    .lists = call.tasks,
                                    .parts = call.at<float>(parts),
                                    .heads = 1,
                                    .scale = scale},
                                   out, stream);
}

template <int kGroup>
Status run_query_gradient(const Plan& plan, const AttentionBackwardParams& a, const Call& call,
                          cudaStream_t stream) {
  QueryGradientArgs args{.batch = call.batch,
                         .lists = {},
                         .row_terms = call.at<float>(call.layout.row_terms),
                         .dq = rows<void>(a.dq),
                         .scale = call.scale,
                         .heads_kv = plan.problem.heads_kv,
                         .words = call.at<Words>(call.layout.words)};
  if (is_sparse(plan.problem)) args.lists = walk::lists(a.block_ids, plan.problem.topk);
  return a.dq.dtype == DType::kF32
             ? launch_query_gradient<kGroup, float>(call.maps, args, call.sms, stream)
             : launch_query_gradient<kGroup, __nv_bfloat16>(call.maps, args, call.sms, stream);
}

template <int kGroup>
Status run_group(const Plan& plan, const AttentionBackwardParams& a, const Call& call,
                 cudaStream_t stream) {
  MSA_TRY(check_cuda(cudaMemsetAsync(call.at<Words>(call.layout.words), 0, sizeof(Words), stream),
                     "attention_backward"));
  MSA_TRY(a.o.dtype == DType::kF32 ? launch_prepare<float>(plan, a, call, stream)
                                   : launch_prepare<__nv_bfloat16>(plan, a, call, stream));
  MSA_TRY(launch_tasks(plan, call, stream));
  MSA_TRY(launch_key_gradient<kGroup>(plan, call, stream));
  MSA_TRY(launch_reduce(call, a.dk, call.layout.dk_parts, call.scale, stream));
  MSA_TRY(launch_reduce(call, a.dv, call.layout.dv_parts, 1, stream));
  return run_query_gradient<kGroup>(plan, a, call, stream);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  return layout(problem, limits).bytes;
}

Status run(const Plan& plan, const AttentionBackwardParams& a, Workspace workspace,
           cudaStream_t stream) {
  Call call{};
  MSA_TRY(make_call(plan, a, workspace, &call));
  MSA_TRY(make_lists(plan, a, &call, stream));
  return plan.problem.group() == 16 ? run_group<16>(plan, a, call, stream)
                                    : run_group<8>(plan, a, call, stream);
}

std::span<const Kernel> kernels() {
  static constexpr Kernel kAll[] = {
      tuned<AttentionBackwardParams, fits, takes, run>(Op::kSparseAttentionBackward,
                                                       "sm90/backward", workspace_bytes),
      tuned<AttentionBackwardParams, fits, takes, run>(Op::kDenseAttentionBackward, "sm90/backward",
                                                       workspace_bytes)};
  return kAll;
}

}  // namespace msa::cuda::sm90::backward
