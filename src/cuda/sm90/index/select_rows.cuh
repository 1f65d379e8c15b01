// The K best of a row of candidates, ids ascending: block scores, or the lists that the parts of a
// split tile left. A warp holds 512 or 1,024 candidates at a time (warp_topk.cuh).
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/index/candidates.cuh"
#include "cuda/sm90/index/config.h"
#include "cuda/sm90/warp_topk.cuh"

namespace msa::cuda::sm90::index {

/// A row of block scores.
struct ScoredRow {
  Candidates range;
  const float* scores;
  int64_t stride;

  /// scores[j], scores[j + 32], ... before `end`.
  template <int kPerLane>
  __device__ void load(float (&to)[kPerLane], int j, int end) const {
    const float* from = scores + j * stride;
    if (stride == 1 && j - WarpTopK::lane() + 32 * kPerLane <= end) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) to[i] = from[32 * i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i, from += 32 * stride)
      to[i] = j + 32 * i < end ? *from : -INFINITY;
  }
  __device__ uint32_t order(int j) const { return order_of(scores[j * stride]); }
  __device__ int id(int j) const { return range.block0 + j; }
};

/// A row of lists. Forced blocks are among the entries.
struct ListedRow {
  Candidates range;
  const Entry* entries;

  template <int kPerLane>
  __device__ void load(float (&to)[kPerLane], int j, int end) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      to[i] = j + 32 * i < end ? score_of(entries[j + 32 * i].order) : -INFINITY;
  }
  __device__ uint32_t order(int j) const { return entries[j].order; }
  __device__ int id(int j) const { return entries[j].id; }
};

/// Rows of select_blocks.
struct GivenScores {
  Selection selection;
  Rows<const float> scores;  ///< [Hi,T,blocks]
  int64_t block_stride;
  const int32_t* num_valid_blocks;  ///< [T], or null: all
  int32_t blocks;

  __device__ ScoredRow row(int head, int token) const {
    const int valid =
        num_valid_blocks == nullptr ? blocks : min(max(num_valid_blocks[token], 0), blocks);
    return {.range = candidates(selection, valid, valid - 1, 0),
            .scores = scores.at(token, head),
            .stride = block_stride};
  }
};

/// Rows that ScoreMatrix left in the workspace: index_select for few queries.
struct BatchScores {
  DeviceBatch batch;
  Selection selection;
  const float* scores;  ///< [T,Hi,max_blocks]
  int32_t heads, max_blocks;

  __device__ ScoredRow row(int head, int token) const {
    const Query t = find_query(batch, selection, token, max_blocks);
    return {.range = t.candidates,
            .scores = scores + (int64_t{token} * heads + head) * max_blocks,
            .stride = 1};
  }
};

/// Rows whose blocks were split: what BestBlocks left in the workspace.
struct BatchLists {
  DeviceBatch batch;
  Selection selection;
  const Entry* lists;  ///< [tiles, rows, splits, kList]
  int32_t heads, splits, rows;

  __device__ ListedRow row(int head, int token) const {
    const Query t = find_query(batch, selection, token, INT32_MAX);
    const int queries = rows / heads;
    const int64_t tile = (token - t.number) / queries + t.sequence + t.number / queries;
    const int entries = t.candidates.visible > 0 ? splits * kList : 0;
    return {.range = {.first = 0, .end = entries, .visible = entries, .block0 = 0},
            .entries = lists + (tile * rows + t.number % queries * heads + head) * entries};
  }
};

/// Where the chosen go.
struct Chosen {
  Rows<int32_t> ids;   ///< [Hi,T,K]
  Rows<float> scores;  ///< [Hi,T,K], or not given
  int32_t heads, tokens, topk;

  /// Writes the ids of `best`, ascending, and -1 behind them.
  __device__ void write(const WarpTopK& best, int head, int token) const {
    const int lane = WarpTopK::lane();
    if (lane >= topk) return;
    const BlockKey mine = lane < best.count() ? best[lane] : kNoBlock;
    const int place = lane < best.count() ? best.place(id_of(mine)) : lane;
    ids.at(token, head)[place] = id_of(mine);
    if (scores.data != nullptr) scores.at(token, head)[place] = score_of(order_of(mine));
  }
};

/// Grid [rows / (rows per CTA), Hi]. kTogether: a row per CTA, each warp looks at a part of its
/// candidates, the first one at what they found. Else a row per warp.
template <class Rows, int kWarps, int kPerLane, bool kTogether>
__global__ void __launch_bounds__(32 * kWarps)
    select_rows(const __grid_constant__ Rows rows, const __grid_constant__ Chosen out) {
  __shared__ BlockKey queues[kWarps][WarpTopK::kQueue];
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = WarpTopK::lane();
  const int head = static_cast<int>(blockIdx.y);
  const int token = static_cast<int>(kTogether ? blockIdx.x : blockIdx.x * kWarps + warp);
  if (token >= out.tokens) return;
  const auto row = rows.row(head, token);
  const Candidates& range = row.range;
  const int want = out.topk - range.forced();

  WarpTopK best(queues[warp], out.topk);
  const auto add_forced = [&] {
    best.push(lane < range.forced() ? key_of(kForcedOrder, range.block0 + range.forced_block(lane))
                                    : kNoBlock);
  };
  if constexpr (kTogether) {
    __shared__ Entry found[kWarps * kMaxSelect];
    const auto cut = [&](int part) {
      return range.first + static_cast<int>(int64_t{range.end - range.first} * part / kWarps);
    };
    choose<kPerLane>(best, row, cut(warp), cut(warp + 1), want);
    if (lane < out.topk) {
      // Every warp's best on lanes of their own, for a lane's greatest to say something about all.
      const BlockKey mine = lane < best.count() ? best[lane] : kNoBlock;
      found[lane * kWarps + warp] = {.order = order_of(mine), .id = id_of(mine)};
    }
    __syncthreads();
    if (warp > 0) return;
    best = WarpTopK(queues[warp], out.topk);
    add_forced();
    // One chunk, since the entries' ids do not ascend.
    static_assert(kMaxSelect * kWarps <= 32 * kPerLane);
    choose<kPerLane>(best, ListedRow{.range = {}, .entries = found}, 0, kWarps * out.topk, want);
  } else {
    add_forced();
    choose<kPerLane>(best, row, range.first, range.end, want);
  }
  out.write(best, head, token);
}

}  // namespace msa::cuda::sm90::index
