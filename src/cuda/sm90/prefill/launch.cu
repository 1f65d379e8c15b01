#include "cuda/sm90/prefill/family.h"

#include <algorithm>

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/prefill/build_lists.cuh"
#include "cuda/sm90/prefill/kv_outer.cuh"
#include "cuda/sm90/prefill/merge.cuh"
#include "cuda/sm90/prefill/overlap.cuh"
#include "cuda/sm90/prefill/union.cuh"
#include "cuda/sm90/prefill/windows.h"
#include "cuda/softmax_scale.h"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::prefill {
namespace {

/// What both orders need of a call.
struct Call {
  CUtensorMap q, k, v;
  DeviceBatch batch;
  Lists lists;
  Operands operands;
  Output out;
  float scale;
  int heads_kv;
  std::byte* workspace;
  uint32_t sms;
  bool measured;  ///< the kernels of the order that the lists do not ask for return at once
};

KeyRows key_rows(const TensorView& keys, KvLayout layout) {
  const bool paged = layout == KvLayout::kPaged;
  return {keys.at<const __nv_bfloat16>(), keys.stride[0], keys.stride[1],
          keys.stride[paged ? 2 : 0]};
}

Status make_call(const Plan& plan, const SparseAttentionParams& a, Workspace workspace, Order order,
                 Call* call) {
  const Problem& problem = plan.problem;
  MSA_TRY(map_queries("q", a.q, static_cast<uint32_t>(problem.group()), 1, &call->q));
  MSA_TRY(map_keys("k", a.k, problem.layout, kBlock, &call->k));
  MSA_TRY(map_keys("v", a.v, problem.layout, kBlock, &call->v));
  call->batch = device_batch(a.batch, a.q.shape[0], a.k, kBlock);
  call->lists = walk::lists(a.block_ids, problem.topk);
  call->operands = {rows<const __nv_bfloat16>(a.q), key_rows(a.k, problem.layout),
                    key_rows(a.v, problem.layout)};
  call->out = {rows<void>(a.o), rows<float>(a.lse)};
  call->scale = softmax_scale(a.softmax_scale, kDim) * kLog2E;
  call->heads_kv = problem.heads_kv;
  call->workspace = static_cast<std::byte*>(workspace.data);
  call->measured = order == Order::kAuto;
  const DeviceInfo* device = nullptr;
  MSA_TRY(device_info(problem.device.id, &device));
  call->sms = static_cast<uint32_t>(device->sms);
  return {};
}

template <int kGroup>
Status launch_overlap(const Call& call, cudaStream_t stream) {
  return launch("sparse_attention (overlap)", measure_overlap<kGroup>,
                {.grid = kSampledTiles, .block = 32}, stream, call.batch, call.lists, call.heads_kv,
                reinterpret_cast<Header*>(call.workspace));
}

template <int kGroup, class Out>
Status launch_union(const Call& call, cudaStream_t stream) {
  const int64_t most_tiles =
      (ceil_div(int64_t{call.batch.tokens}, int64_t{kRows / kGroup}) + call.batch.sequences + 1) *
      call.heads_kv;
  const UnionArgs args{.batch = call.batch,
                       .lists = call.lists,
                       .operands = call.operands,
                       .out = call.out,
                       .scale = call.scale,
                       .heads_kv = call.heads_kv,
                       .header = reinterpret_cast<Header*>(call.workspace),
                       .measured = call.measured};
  return launch("sparse_attention (union)", &attend_union<kGroup, Out>,
                {.grid = static_cast<uint32_t>(std::min<int64_t>(most_tiles, call.sms)),
                 .block = kThreads,
                 .shared_bytes = sizeof(UnionShared<kGroup>)},
                stream, call.q, call.k, call.v, args);
}

/// The lists of windows first .. first+count-1; they are the workspace's windows 0 .. count-1.
template <int kGroup>
Status launch_lists(const Call& call, const Windows& w, int64_t first, int64_t count,
                    cudaStream_t stream) {
  return launch("sparse_attention (lists)", build_lists,
                {.grid = dim3(static_cast<uint32_t>(count), static_cast<uint32_t>(call.heads_kv)),
                 .block = kListThreads,
                 .shared_bytes = sizeof(ListBuilder::Shared)},
                stream,
                ListsArgs{.batch = call.batch,
                          .lists = call.lists,
                          .windows = w,
                          .workspace = call.workspace,
                          .first_window = static_cast<int>(first),
                          .heads_kv = call.heads_kv,
                          .tile_queries = kTileRows / kGroup,
                          .measured = call.measured});
}

/// Partial results of window first + i.
template <int kGroup>
Status launch_blocks(const Call& call, const Windows& w, int64_t first, int64_t i,
                     cudaStream_t stream) {
  const int64_t entries = call.heads_kv * w.tokens * call.lists.topk;
  const auto o =
      TensorView::contiguous(call.workspace + w.o, DType::kBF16, {entries, kGroup, kDim});
  CUtensorMap parts;
  MSA_TRY(map_queries("partial results", o, kGroup, 1, &parts));
  return launch(
      "sparse_attention (blocks)", attend_blocks<kGroup>,
      {.grid = call.sms,
       .block = kTileThreads,
       .shared_bytes = sizeof(KvOuterShared<kGroup>),
       .overlap = true},
      stream, call.q, call.k, call.v, parts,
      KvOuterArgs{.lists = window_lists(w, call.workspace, call.heads_kv, call.lists.topk, i),
                  .softmax = reinterpret_cast<PartSoftmax*>(call.workspace + w.softmax),
                  .first = static_cast<int>((first + i) * w.tokens),
                  .window_tokens = static_cast<int>(w.tokens),
                  .heads_kv = call.heads_kv,
                  .topk = call.lists.topk,
                  .scale = call.scale,
                  .paged = call.batch.page_table != nullptr,
                  .workspace = call.workspace,
                  .measured = call.measured});
}

/// Results of window first + i.
template <int kGroup, class Out>
Status launch_merge(const Call& call, const Windows& w, int64_t first, int64_t i,
                    cudaStream_t stream) {
  const int64_t begin = (first + i) * w.tokens;
  const int64_t tokens = std::min(w.tokens, call.batch.tokens - begin);
  const int64_t ctas = ceil_div(tokens * kGroup * kMergeLanes, int64_t{kMergeThreads});
  return launch(
      "sparse_attention (merge)", merge_parts<Out>,
      {.grid = dim3(static_cast<uint32_t>(ctas), static_cast<uint32_t>(call.heads_kv)),
       .block = kMergeThreads,
       .overlap = true},
      stream,
      MergeArgs{.chosen = window_lists(w, call.workspace, call.heads_kv, call.lists.topk, i).chosen,
                .softmax = reinterpret_cast<const PartSoftmax*>(call.workspace + w.softmax),
                .o = reinterpret_cast<const __nv_bfloat16*>(call.workspace + w.o),
                .batch = call.batch,
                .lists = call.lists,
                .operands = call.operands,
                .out = call.out,
                .scale = call.scale,
                .first = static_cast<int>(begin),
                .tokens = static_cast<int>(tokens),
                .window_tokens = static_cast<int>(w.tokens),
                .group = kGroup,
                .topk = call.lists.topk,
                .workspace = call.workspace,
                .measured = call.measured});
}

template <int kGroup, class Out>
Status launch_kv_outer(const Call& call, const Windows& w, cudaStream_t stream) {
  const int64_t windows = ceil_div(int64_t{call.batch.tokens}, w.tokens);
  for (int64_t first = 0; first < windows; first += w.round) {
    const int64_t count = std::min(w.round, windows - first);
    MSA_TRY(launch_lists<kGroup>(call, w, first, count, stream));
    for (int64_t i = 0; i < count; ++i) {
      MSA_TRY(launch_blocks<kGroup>(call, w, first, i, stream));
      MSA_TRY((launch_merge<kGroup, Out>(call, w, first, i, stream)));
    }
  }
  return {};
}

template <int kGroup, class Out>
Status run_order(const Plan& plan, const Call& call, Order order, cudaStream_t stream) {
  if (order != Order::kKvOuter) {
    MSA_TRY(
        check_cuda(cudaMemsetAsync(call.workspace, 0, sizeof(Header), stream), "sparse_attention"));
  }
  if (call.measured) MSA_TRY(launch_overlap<kGroup>(call, stream));
  if (order != Order::kKvOuter) MSA_TRY((launch_union<kGroup, Out>(call, stream)));
  if (order == Order::kUnion) return {};
  return launch_kv_outer<kGroup, Out>(call, windows(plan.problem, plan.limits), stream);
}

}  // namespace

int64_t workspace_bytes(const Problem& problem, const Limits& limits, Order order) {
  return order_of(order, limits) == Order::kUnion ? kHeaderBytes : windows(problem, limits).bytes;
}

Status run(const Plan& plan, const SparseAttentionParams& a, Workspace workspace, Order asked,
           cudaStream_t stream) {
  if (a.q.shape[0] == 0) return {};
  const Order order = order_of(asked, plan.limits);
  Call call{};
  MSA_TRY(make_call(plan, a, workspace, order, &call));
  const auto start = [&]<class Out>(Out) {
    return plan.problem.group() == 16 ? run_order<16, Out>(plan, call, order, stream)
                                      : run_order<8, Out>(plan, call, order, stream);
  };
  return a.o.dtype == DType::kF32 ? start(float{}) : start(__nv_bfloat16{});
}

namespace {

template <Order kOrder>
int64_t bytes_of(const Problem& problem, const Limits& limits) {
  return workspace_bytes(problem, limits, kOrder);
}
template <Order kOrder>
Status run_in(const Plan& plan, const SparseAttentionParams& a, Workspace workspace,
              Stream stream) {
  return run(plan, a, workspace, kOrder, stream);
}
template <Order kOrder>
constexpr Kernel kKernel = tuned<SparseAttentionParams, fits, takes, run_in<kOrder>>(
    Op::kSparseAttention, "sm90/prefill", bytes_of<kOrder>);

}  // namespace

const Kernel& kernel(Order order) {
  if (order == Order::kUnion) return kKernel<Order::kUnion>;
  return order == Order::kKvOuter ? kKernel<Order::kKvOuter> : kKernel<Order::kAuto>;
}

}  // namespace msa::cuda::sm90::prefill
