// Block selection: a warp per row. The K-th best score is found bit by bit, so K and the number of
// blocks are free; then the row is walked once in ascending order, which writes ascending ids and
// gives ties to the lower ones.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/scores.h"
#include "cuda/smxx/tile.cuh"
#include "cuda/topk.cuh"

namespace msa::cuda::plain {
namespace {

/// By the caller's count of valid blocks.
struct CountedRows {
  const int32_t* valid;  ///< [T], or null: all columns
  int columns;

  __device__ Candidates operator()(const Selection& selection, int t) const {
    const int blocks = valid == nullptr ? columns : max(0, min(valid[t], columns));
    return candidates(selection, blocks, blocks - 1, 0);
  }
};

/// By what the query sees.
struct BatchRows {
  DeviceBatch batch;
  int first;  ///< query row of row 0
  int columns;

  __device__ Candidates operator()(const Selection& selection, int t) const {
    const Query query = query_at(batch, first + t);
    const int blocks = (query.visible + batch.block_size - 1) / batch.block_size;
    const int64_t position = query.position();
    const int64_t own = position < 0 ? -1 : position / batch.block_size;
    return candidates(selection, min(blocks, columns),
                      batch.causal ? own - query.s.block0 : int64_t{blocks - 1}, query.s.block0);
  }
};

struct Select {
  Tensor scores;      ///< f32 [Hi,tokens,columns]
  Tensor ids;         ///< [Hi,T,K]
  Tensor ids_scores;  ///< f32 [Hi,T,K], or not given
  int first;          ///< row of ids that row 0 of scores is
  int tokens, heads;
  Selection selection;
};

template <class Rows>
__global__ void __launch_bounds__(128) select_kernel(Select a, Rows rows) {
  const int64_t row = int64_t{blockIdx.x} * warps() + warp();
  if (row >= int64_t{a.tokens} * a.heads) return;
  const int t = static_cast<int>(row / a.heads), r = static_cast<int>(row % a.heads);
  const Candidates choices = rows(a.selection, t);
  const int topk = a.selection.topk, blocks = choices.visible, wanted = min(topk, blocks);
  const auto key_of = [&](int j) {
    return choices.is_forced(j) ? kForcedOrder : order_of(a.scores.at<float>(r, t, j));
  };

  // The largest threshold that `wanted` keys reach.
  uint32_t threshold = 0;
  for (uint32_t bit = 0x80000000u; bit != 0 && wanted > 0 && wanted < blocks; bit /= 2) {
    int reach = 0;
    for (int j = lane(); j < blocks; j += 32) reach += key_of(j) >= (threshold | bit);
    if (__reduce_add_sync(0xffffffff, reach) >= wanted) threshold |= bit;
  }
  int above = 0;
  for (int j = lane(); j < blocks; j += 32) above += key_of(j) > threshold;
  int equal_left = wanted - __reduce_add_sync(0xffffffff, above);

  const uint32_t lanes_before = (1u << lane()) - 1;
  int used = 0;
  for (int j0 = 0; j0 < blocks && used < wanted; j0 += 32) {
    const int j = j0 + lane();
    const uint32_t key = j < blocks ? key_of(j) : 0;
    const bool equal = j < blocks && key == threshold;
    const uint32_t equals = __ballot_sync(0xffffffff, equal);
    const bool taken =
        j < blocks && (key > threshold || (equal && __popc(equals & lanes_before) < equal_left));
    const uint32_t all_taken = __ballot_sync(0xffffffff, taken);
    if (taken) {
      const int slot = used + __popc(all_taken & lanes_before);
      a.ids.at<int32_t>(r, a.first + t, slot) = choices.block0 + j;
      if (a.ids_scores.data != nullptr)
        a.ids_scores.at<float>(r, a.first + t, slot) =
            key == kForcedOrder ? infinity() : a.scores.at<float>(r, t, j);
    }
    equal_left -= min(equal_left, __popc(equals));
    used += __popc(all_taken);
  }
  for (int slot = wanted + lane(); slot < topk; slot += 32) {
    a.ids.at<int32_t>(r, a.first + t, slot) = -1;
    if (a.ids_scores.data != nullptr) a.ids_scores.at<float>(r, a.first + t, slot) = -infinity();
  }
}

LaunchShape warp_per_row(int64_t rows) {
  constexpr int64_t kWarps = 4;
  return {.grid = dim3(static_cast<uint32_t>(ceil_div(rows, kWarps))), .block = dim3(32 * kWarps)};
}

template <class Rows>
Status select(const Select& a, const Rows& rows, cudaStream_t stream) {
  return launch("select_blocks", select_kernel<Rows>, warp_per_row(int64_t{a.tokens} * a.heads),
                stream, a, rows);
}

struct MergeLists {
  Tensor scores_parts, ids_parts;  ///< [parts,Hi,T,K]
  Tensor ids, scores;              ///< [Hi,T,K]; the latter may be not given
  int parts, tokens, heads, topk;
};

/// A warp per row compares each entry with all others, twice: who is better, then where it goes.
__global__ void __launch_bounds__(128) merge_lists_kernel(MergeLists a) {
  const int64_t row = int64_t{blockIdx.x} * warps() + warp();
  if (row >= int64_t{a.tokens} * a.heads) return;
  const int t = static_cast<int>(row / a.heads), r = static_cast<int>(row % a.heads);
  const int entries = a.parts * a.topk;
  const auto id_of = [&](int i) {
    return a.ids_parts.at<const int32_t>(i / a.topk, r, t, i % a.topk);
  };
  const auto score_of = [&](int i) {
    return a.scores_parts.at<const float>(i / a.topk, r, t, i % a.topk);
  };
  // By score, then by the lower id; 0: padding.
  const auto key_of = [&](int i) {
    const int32_t id = id_of(i);
    if (id < 0) return uint64_t{0};
    return uint64_t{order_of(score_of(i))} << 32 | ~static_cast<uint32_t>(id);
  };

  uint64_t threshold = 1;  // the K-th best key, or that of every list that is not padding
  int valid = 0;
  for (int i0 = 0; i0 < entries; i0 += 32) {
    const int i = i0 + lane();
    const uint64_t key = i < entries ? key_of(i) : 0;
    int better = 0;
    for (int j = 0; j < entries && key != 0; ++j) better += key_of(j) > key;
    const uint32_t last = __ballot_sync(0xffffffff, key != 0 && better == a.topk - 1);
    if (last != 0) threshold = __shfl_sync(0xffffffff, key, __ffs(static_cast<int>(last)) - 1);
    valid += __popc(__ballot_sync(0xffffffff, key != 0));
  }
  for (int i = lane(); i < entries; i += 32) {
    if (key_of(i) < threshold) continue;
    int slot = 0;
    for (int j = 0; j < entries; ++j) slot += key_of(j) >= threshold && id_of(j) < id_of(i);
    if (slot >= a.topk) continue;  // never for distinct blocks
    const float score = score_of(i);
    a.ids.at<int32_t>(r, t, slot) = id_of(i);
    if (a.scores.data != nullptr)
      a.scores.at<float>(r, t, slot) = isnan(score) ? -infinity() : score;
  }
  for (int slot = min(valid, a.topk) + lane(); slot < a.topk; slot += 32) {
    a.ids.at<int32_t>(r, t, slot) = -1;
    if (a.scores.data != nullptr) a.scores.at<float>(r, t, slot) = -infinity();
  }
}

// index_select scores and selects this many query rows at a time, so that scores never take more
// memory than this (or one row's).
constexpr int64_t kMostScoreBytes = int64_t{64} << 20;

int64_t rows_at_once(const Problem& p, int64_t columns, int64_t tokens) {
  const int64_t row_bytes = std::max<int64_t>(1, p.heads_kv * columns * 4);
  return std::clamp<int64_t>(kMostScoreBytes / row_bytes, 1, std::max<int64_t>(tokens, 1));
}

}  // namespace

int64_t index_select_bytes(const Problem& p, const Limits& limits) {
  const int64_t columns = ceil_div(limits.max_seqlen_k, int64_t{p.block_size});
  return rows_at_once(p, columns, limits.max_tokens) * p.heads_kv * columns * 4;
}

template <>
Status run(const Plan& plan, const SelectBlocksParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const Select args{.scores = tensor(a.scores),
                    .ids = tensor(a.block_ids),
                    .ids_scores = {},
                    .first = 0,
                    .tokens = static_cast<int>(a.scores.shape[1]),
                    .heads = p.heads_kv,
                    .selection = selection_of(p)};
  const CountedRows rows{
      .valid = a.num_valid_blocks.given() ? a.num_valid_blocks.at<const int32_t>() : nullptr,
      .columns = static_cast<int>(a.scores.shape[2])};
  return select(args, rows, stream);
}

template <>
Status run(const Plan& plan, const IndexSelectParams& a, Workspace workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const int64_t tokens = a.q_idx.shape[0];
  const int64_t columns = most_blocks(plan, a.batch, a.k_idx);
  const int64_t most = rows_at_once(p, ceil_div(plan.limits.max_seqlen_k, int64_t{p.block_size}),
                                    plan.limits.max_tokens);
  const DeviceBatch batch = device_batch(a.batch, tokens, a.k_idx, p.block_size);
  for (int64_t first = 0; first < tokens; first += most) {
    const int64_t count = std::min(most, tokens - first);
    const Tensor scores =
        tensor(TensorView::contiguous(workspace.data, DType::kF32, {p.heads_kv, count, columns}));
    MSA_TRY(block_scores({.batch = batch,
                          .q = tensor(a.q_idx),
                          .keys = key_tensor(a.k_idx, p.layout),
                          .scores = scores,
                          .heads = p.heads_kv,
                          .group = p.heads_kv,
                          .dim = p.index_dim,
                          .first = static_cast<int>(first),
                          .tokens = static_cast<int>(count),
                          .columns = static_cast<int>(columns)},
                         stream));
    MSA_TRY(select(
        Select{.scores = scores,
               .ids = tensor(a.block_ids),
               .ids_scores = tensor(a.scores),
               .first = static_cast<int>(first),
               .tokens = static_cast<int>(count),
               .heads = p.heads_kv,
               .selection = selection_of(p)},
        BatchRows{
            .batch = batch, .first = static_cast<int>(first), .columns = static_cast<int>(columns)},
        stream));
  }
  return {};
}

template <>
Status run(const Plan& plan, const MergeListsParams& a, Workspace, cudaStream_t stream) {
  const int64_t tokens = a.block_ids.shape[1];
  return launch("merge_lists", merge_lists_kernel, warp_per_row(tokens * plan.problem.heads_kv),
                stream,
                MergeLists{.scores_parts = tensor(a.scores_parts),
                           .ids_parts = tensor(a.block_ids_parts),
                           .ids = tensor(a.block_ids),
                           .scores = tensor(a.scores),
                           .parts = static_cast<int>(a.scores_parts.shape[0]),
                           .tokens = static_cast<int>(tokens),
                           .heads = plan.problem.heads_kv,
                           .topk = plan.problem.topk});
}

}  // namespace msa::cuda::plain
