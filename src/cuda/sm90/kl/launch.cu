#include "cuda/sm90/kl/family.h"

#include <algorithm>
#include <climits>

#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/kl/index_lse.cuh"
#include "cuda/sm90/kl/kl_blocks.cuh"
#include "cuda/sm90/kl/merge.cuh"
#include "cuda/sm90/kl/parts.h"
#include "cuda/sm90/walk/launch_tasks.cuh"
#include "cuda/smxx/plain.h"
#include "cuda/softmax_scale.h"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::kl {
namespace {

Parts parts_of(const Problem& problem, const Limits& limits, bool listed) {
  return parts(problem, limits, listed, plain::block_lists_bytes(problem, limits));
}

/// What all operators need of a call. The views are the arguments' own.
struct Call {
  DeviceBatch batch;
  Parts parts;
  walk::InverseLists lists;
  walk::Lists ids;
  std::byte* workspace;
  int64_t rounds;
  int heads;  ///< Hkv
  uint32_t sms;

  int64_t tokens() const { return batch.tokens; }
  float* floats(int64_t begin) const { return reinterpret_cast<float*>(workspace + begin); }
  Readers readers() const {
    return {.tasks = walk::task_lists(parts.tasks, workspace),
            .lists = lists,
            .tokens = batch.tokens,
            .slots = static_cast<int32_t>(parts.slots)};
  }
  Slots slots(int64_t round) const {
    return {.batch = batch,
            .lists = ids,
            .round = static_cast<int32_t>(round),
            .slots = static_cast<int32_t>(parts.slots)};
  }
  walk::Round blocks(int64_t round) const {
    if (lists.entries != nullptr) return {};
    return {.first = static_cast<int32_t>(round * kMostSlots), .count = kMostSlots};
  }
};

/// The inverse lists of a call with ids.
template <class Params>
Status make_lists(const Plan& plan, const Params& a, Call* call, cudaStream_t stream) {
  BlockListsParams lists{.block_ids = a.block_ids, .batch = a.batch};
  if constexpr (requires { a.row_ptr; }) lists.row_ptr = a.row_ptr, lists.entries = a.entries;
  return walk::make_inverse_lists(plan, lists,
                                  {.rows = call->parts.tasks.rows,
                                   .row_ptr = call->workspace + call->parts.row_ptr,
                                   .entries = call->workspace + call->parts.entries,
                                   .scratch = call->workspace + call->parts.scratch},
                                  stream, &call->lists);
}

template <class Params>
Status make_call(const Plan& plan, const Params& a, Workspace workspace, Call* call,
                 cudaStream_t stream) {
  const Problem& p = plan.problem;
  const bool listed = a.block_ids.given();
  call->batch = device_batch(a.batch, a.q_idx.shape[0], a.k_idx, kBlock);
  call->parts = parts_of(p, plan.limits, listed);
  call->workspace = static_cast<std::byte*>(workspace.data);
  call->rounds =
      std::min(call->parts.rounds,
               std::max<int64_t>(1, ceil_div(a.k_idx.shape[0], int64_t{kMostSlots} * kBlock)));
  call->heads = p.heads_kv;
  const DeviceInfo* device = nullptr;
  MSA_TRY(device_info(p.device.id, &device));
  call->sms = static_cast<uint32_t>(device->sms);
  call->lists = {.topk = p.topk};
  if (!listed) return {};
  call->ids = walk::lists(a.block_ids, p.topk);
  return make_lists(plan, a, call, stream);
}

Status launch_tasks(const char* name, const Call& call, int64_t round, cudaStream_t stream) {
  return walk::launch_make_tasks(name,
                                 {.batch = call.batch,
                                  .lists = call.lists,
                                  .out = call.readers().tasks,
                                  .heads_kv = call.heads,
                                  .blocks = call.blocks(round)},
                                 stream);
}

/// A warp for each (query row, head).
LaunchShape merge_shape(const Call& call) {
  return {.grid = dim3(static_cast<uint32_t>(ceil_div(call.tokens(), int64_t{kMergeThreads / 32})),
                       static_cast<uint32_t>(call.heads)),
          .block = kMergeThreads,
          .overlap = true};
}

// ---- index_lse ----

Status run_index_lse(const Call& call, const IndexLseParams& a, cudaStream_t stream) {
  CUtensorMap k_idx;
  MSA_TRY(map_keys("k_idx", a.k_idx, KvLayout::kPacked, kBlock, &k_idx));
  for (int64_t round = 0; round < call.rounds; ++round) {
    MSA_TRY(launch_tasks("index_lse (tasks)", call, round, stream));
    constexpr uint32_t kOfAnSM = 2;
    MSA_TRY(launch("index_lse (blocks)", index_lse_blocks,
                   {.grid = kOfAnSM * call.sms,
                    .block = kLseThreads,
                    .shared_bytes = sizeof(IndexLseShared),
                    .overlap = true},
                   stream, k_idx,
                   IndexLseArgs{.readers = call.readers(),
                                .q_idx = rows<const __nv_bfloat16>(a.q_idx),
                                .scale = softmax_scale(0, kDim) * kLog2E,
                                .lse_parts = call.floats(call.parts.scalars)}));
    MSA_TRY(launch("index_lse (merge)", merge_lse, merge_shape(call), stream,
                   MergeLseArgs{.slots = call.slots(round),
                                .lse_parts = call.floats(call.parts.scalars),
                                .lse = rows<float>(a.lse)}));
  }
  return {};
}

// ---- the KL ----

KlArgs kl_args(const Call& call, const KlParams& a) {
  return {.readers = call.readers(),
          .lse = rows<const float>(a.lse),
          .index_lse = rows<const float>(a.index_lse),
          .q_idx = rows<const __nv_bfloat16>(a.q_idx),
          .scale = softmax_scale(a.softmax_scale, kDim) * kLog2E,
          .index_scale = softmax_scale(0, kDim) * kLog2E,
          .queries = call.batch.cu_seqlens_q + call.batch.sequences,
          .unit = softmax_scale(0, kDim) / static_cast<float>(call.heads),
          .dq_parts = call.floats(call.parts.dq),
          .dk_parts = call.floats(call.parts.dk),
          .kl_parts = a.kl.given() ? call.floats(call.parts.scalars) : nullptr};
}

template <int kGroup, bool kGradients>
Status launch_blocks(const Call& call, const KlParams& a, cudaStream_t stream) {
  CUtensorMap q, k, k_idx;
  MSA_TRY(map_queries("q", a.q, kGroup, 1, &q));
  MSA_TRY(map_keys("k", a.k, KvLayout::kPacked, kBlock, &k));
  MSA_TRY(map_keys("k_idx", a.k_idx, KvLayout::kPacked, kBlock, &k_idx));
  return launch("kl (blocks)", kl_blocks<kGroup, kGradients>,
                {.grid = call.sms,
                 .block = kThreads,
                 .shared_bytes = sizeof(KlShared<kGroup>),
                 .overlap = true},
                stream, q, k, k_idx, kl_args(call, a));
}

template <bool kGradients>
Status launch_blocks(const Call& call, const KlParams& a, int group, cudaStream_t stream) {
  return group == 16 ? launch_blocks<16, kGradients>(call, a, stream)
                     : launch_blocks<8, kGradients>(call, a, stream);
}

/// dq_idx and kl of a round: sums until the last one, which writes the output.
Status launch_merge(const Call& call, const KlParams& a, int64_t round, cudaStream_t stream) {
  const bool gradients = a.dq_idx.given(), last = round + 1 == call.rounds;
  float* const sums = call.floats(call.parts.sums);
  MergeKlArgs args{.slots = call.slots(round),
                   .dq_parts = gradients ? call.floats(call.parts.dq) : nullptr,
                   .before = round > 0 ? sums : nullptr,
                   .dq = {sums, kDim, call.tokens() * kDim},
                   .kl_parts = a.kl.given() ? call.floats(call.parts.scalars) : nullptr,
                   .kl = rows<float>(a.kl)};
  if (last) args.dq = rows<void>(a.dq_idx);
  const bool narrow = last && gradients && a.dq_idx.dtype == DType::kBF16;
  return launch("kl (merge)", narrow ? merge_kl<__nv_bfloat16> : merge_kl<float>, merge_shape(call),
                stream, args);
}

Status launch_reduce(const Call& call, const KlParams& a, int64_t round, cudaStream_t stream) {
  return walk::launch_reduce_parts("kl (keys)",
                                   {.batch = call.batch,
                                    .lists = call.readers().tasks,
                                    .parts = call.floats(call.parts.dk),
                                    .heads = call.heads,
                                    .scale = 1,
                                    .blocks = call.blocks(round)},
                                   a.dk_idx, stream);
}

Status run_kl(const Call& call, const KlParams& a, int group, cudaStream_t stream) {
  const bool gradients = a.dq_idx.given();
  for (int64_t round = 0; round < call.rounds; ++round) {
    MSA_TRY(launch_tasks("kl (tasks)", call, round, stream));
    MSA_TRY(gradients ? launch_blocks<true>(call, a, group, stream)
                      : launch_blocks<false>(call, a, group, stream));
    MSA_TRY(launch_merge(call, a, round, stream));
    if (gradients) MSA_TRY(launch_reduce(call, a, round, stream));
  }
  return {};
}

}  // namespace

int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  const int64_t all = parts_of(problem, limits, /*listed=*/false).bytes;
  return fits_lists(problem) ? std::max(all, parts_of(problem, limits, true).bytes) : all;
}

Status run(const Plan& plan, const IndexLseParams& a, Workspace workspace, cudaStream_t stream) {
  Call call{};
  MSA_TRY(make_call(plan, a, workspace, &call, stream));
  return run_index_lse(call, a, stream);
}

Status run(const Plan& plan, const KlParams& a, Workspace workspace, cudaStream_t stream) {
  Call call{};
  MSA_TRY(make_call(plan, a, workspace, &call, stream));
  return run_kl(call, a, plan.problem.group(), stream);
}

std::span<const Kernel> kernels() {
  static constexpr Kernel kAll[] = {
      tuned<IndexLseParams, fits, takes, run>(Op::kIndexLse, "sm90/kl", workspace_bytes),
      tuned<KlParams, fits, takes, run>(Op::kKlBackward, "sm90/kl", workspace_bytes),
      tuned<KlParams, fits, takes, run>(Op::kKlLoss, "sm90/kl", workspace_bytes)};
  return kAll;
}

}  // namespace msa::cuda::sm90::kl
