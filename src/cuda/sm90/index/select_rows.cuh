// The K best of a row of candidates, ids ascending: block scores, or the lists that the parts of a
// split tile left. A warp holds 512 or 1,024 candidates at a time in registers. Those that may be
// among the best queue up in shared memory, where everyone's rank is counted when the queue is
// full. Nothing is sorted.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/index/config.h"
#include "cuda/sm90/index/order.cuh"
#include "cuda/sm90/index/range.cuh"

namespace msa::cuda::sm90::index {

inline constexpr uint64_t kNone = 0;  ///< packs kNoKey and id -1

/// Keys and ids of candidates as one number: greater is better, and no two are equal.
__device__ inline uint64_t pack(int key, int id) {
  return uint64_t{static_cast<uint32_t>(key) ^ 0x80000000U} << 32 | ~static_cast<uint32_t>(id);
}
__device__ inline int key_of(uint64_t packed) {
  return static_cast<int>(static_cast<uint32_t>(packed >> 32) ^ 0x80000000U);
}
__device__ inline int id_of(uint64_t packed) {
  return static_cast<int>(~static_cast<uint32_t>(packed));
}

__device__ inline int next_key(int key) { return static_cast<int>(static_cast<uint32_t>(key) + 1); }

/// One warp's best `want` candidates, in `queue[0 .. count-1]`, best first after rank().
class Best {
 public:
  static constexpr int kQueue = 64;

  __device__ Best(uint64_t* queue, int want) : queue_(queue), want_(want) {}

  __device__ int count() const { return count_; }
  __device__ uint64_t operator[](int i) const { return queue_[i]; }
  /// The worst of `want` that were there at the last rank(): others must be better.
  /// Before, kNone.
  __device__ uint64_t worst() const { return worst_; }

  /// A candidate per lane, or kNone, in any order.
  __device__ void push(uint64_t candidate) {
    const uint32_t better = __ballot_sync(0xffffffff, candidate > worst_);
    if (candidate > worst_) queue_[count_ + __popc(better & ((1U << lane()) - 1))] = candidate;
    count_ += __popc(better);
    if (count_ > kQueue - 32) rank();
  }

  /// Leaves the best `want`, in order.
  __device__ void rank() {
    __syncwarp();
    const uint64_t low = lane() < count_ ? queue_[lane()] : kNone;
    const uint64_t high = lane() + 32 < count_ ? queue_[lane() + 32] : kNone;
    int low_rank = 0, high_rank = 0;
#pragma unroll 4
    for (int i = 0; i < count_; ++i) low_rank += queue_[i] > low;
    if (count_ > 32) {
#pragma unroll 4
      for (int i = 0; i < count_; ++i) high_rank += queue_[i] > high;
    }
    __syncwarp();
    if (lane() < count_ && low_rank < want_) queue_[low_rank] = low;
    if (lane() + 32 < count_ && high_rank < want_) queue_[high_rank] = high;
    __syncwarp();
    count_ = min(count_, want_);
    if (count_ == want_ && want_ > 0) worst_ = queue_[want_ - 1];
  }

  /// How many of them have a lower id than `id`: its place in ascending order.
  __device__ int place(int id) const {
    int lower = 0;
#pragma unroll 4
    for (int i = 0; i < count_; ++i) lower += id_of(queue_[i]) < id;
    return lower;
  }

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

 private:
  uint64_t* queue_;  // shared memory, kQueue
  int want_;
  int count_ = 0;
  uint64_t worst_ = kNone;
};

/// A score that at least `want` of the warp's scores reach, near the `want`-th greatest; -inf if
/// there are fewer.
__device__ inline float reached_by(float score, int want) {
  // The lane's number makes keys distinct; it costs the bound its last five bits.
  const int key = (key_of(score) & ~31) | Best::lane();
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) rank += __shfl_sync(0xffffffff, key, i) > key;
  const uint32_t holder = __ballot_sync(0xffffffff, rank == want - 1);
  const int bound = __shfl_sync(0xffffffff, key & ~31, __ffs(static_cast<int>(holder)) - 1);
  return score_of(max(bound, key_of(-INFINITY)));
}

/// Candidates begin .. end-1 of a row into `best`, of which at most `want` can get there. A lane
/// holds kPerLane scores at a time.
template <int kPerLane, class Row>
__device__ void choose(Best& best, const Row& row, int begin, int end, int want) {
  constexpr int kChunk = 32 * kPerLane;
  const int lane = Best::lane();
  if (want == 0) end = begin;
  float bound = -INFINITY;  // lesser scores are out of the question; NaN counts as -inf
  for (int base = begin; base < end; base += kChunk) {
    float scores[kPerLane];
    row.load(scores, base + lane, end);
    if (base == begin && end - begin > 32) {
      float greatest = -INFINITY;
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) greatest = fmaxf(greatest, scores[i]);
      bound = reached_by(greatest, want);
    }
    uint32_t hits = 0;  // bit i: candidate base + 32*i + lane
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) hits |= static_cast<uint32_t>(!(scores[i] < bound)) << i;
    const int mine = min(max((end - base - lane + 31) / 32, 0), kPerLane);
    if (mine < 32) hits &= (1U << mine) - 1;
    while (__any_sync(0xffffffff, hits != 0)) {
      const int j = base + lane + 32 * (__ffs(static_cast<int>(hits)) - 1);
      best.push(hits != 0 ? pack(row.key(j), row.id(j)) : kNone);
      hits &= hits - 1;
    }
    // Later candidates have higher ids: they must be better.
    if (best.worst() != kNone) bound = score_of(next_key(key_of(best.worst())));
  }
  best.rank();
}

/// A row of block scores.
struct ScoredRow {
  BlockRange range;
  int block0;
  const float* scores;
  int64_t stride;

  /// scores[j], scores[j + 32], ... before `end`.
  template <int kPerLane>
  __device__ void load(float (&to)[kPerLane], int j, int end) const {
    const float* from = scores + j * stride;
    if (stride == 1 && j - Best::lane() + 32 * kPerLane <= end) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) to[i] = from[32 * i];
      return;
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i, from += 32 * stride)
      to[i] = j + 32 * i < end ? *from : -INFINITY;
  }
  __device__ int key(int j) const { return key_of(scores[j * stride]); }
  __device__ int id(int j) const { return block0 + j; }
};

/// A row of lists. Forced blocks are among the entries.
struct ListedRow {
  BlockRange range;
  int block0;
  const Entry* entries;

  template <int kPerLane>
  __device__ void load(float (&to)[kPerLane], int j, int end) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i)
      to[i] = j + 32 * i < end ? score_of(entries[j + 32 * i].key) : -INFINITY;
  }
  __device__ int key(int j) const { return entries[j].key; }
  __device__ int id(int j) const { return entries[j].id; }
};

/// Rows of select_blocks.
struct GivenScores {
  Selection selection;
  const float* scores;  ///< [Hi,T,blocks]
  int64_t head_stride, token_stride, block_stride;
  const int32_t* num_valid_blocks;  ///< [T], or null: all
  int32_t blocks;

  __device__ ScoredRow row(int head, int token) const {
    const int valid =
        num_valid_blocks == nullptr ? blocks : min(max(num_valid_blocks[token], 0), blocks);
    return {.range = block_range(selection, valid, valid - 1, 0),
            .block0 = 0,
            .scores = scores + head * head_stride + token * token_stride,
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
    const Token t = find_token(batch, selection, token, max_blocks);
    return {.range = t.range,
            .block0 = t.block0,
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
    const Token t = find_token(batch, selection, token, INT32_MAX);
    const int queries = rows / heads;
    const int64_t tile = (token - t.query) / queries + t.sequence + t.query / queries;
    const int entries = t.range.visible > 0 ? splits * kList : 0;
    return {.range = {.first = 0, .end = entries, .visible = entries},
            .block0 = 0,
            .entries = lists + (tile * rows + t.query % queries * heads + head) * entries};
  }
};

/// Where the chosen go.
struct Chosen {
  int32_t* ids;  ///< [Hi,T,K]
  int64_t ids_head_stride, ids_token_stride;
  float* scores;  ///< [Hi,T,K], or null
  int64_t scores_head_stride, scores_token_stride;
  int32_t heads, tokens, topk;

  /// Writes the ids of `best`, ascending, and -1 behind them.
  __device__ void write(const Best& best, int head, int token) const {
    const int lane = Best::lane();
    if (lane >= topk) return;
    const uint64_t mine = lane < best.count() ? best[lane] : kNone;
    const int place = lane < best.count() ? best.place(id_of(mine)) : lane;
    ids[head * ids_head_stride + token * ids_token_stride + place] = id_of(mine);
    if (scores != nullptr)
      scores[head * scores_head_stride + token * scores_token_stride + place] =
          score_of(key_of(mine));
  }
};

/// Grid [rows / (rows per CTA), Hi]. kTogether: a row per CTA, each warp looks at a part of its
/// candidates, the first one at what they found. Else a row per warp.
template <class Rows, int kWarps, int kPerLane, bool kTogether>
__global__ void __launch_bounds__(32 * kWarps)
    select_rows(const __grid_constant__ Rows rows, const __grid_constant__ Chosen out) {
  __shared__ uint64_t queues[kWarps][Best::kQueue];
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = Best::lane();
  const int head = static_cast<int>(blockIdx.y);
  const int token = static_cast<int>(kTogether ? blockIdx.x : blockIdx.x * kWarps + warp);
  if (token >= out.tokens) return;
  const auto row = rows.row(head, token);
  const BlockRange& range = row.range;
  const int want = out.topk - range.forced();

  Best best(queues[warp], out.topk);
  const auto add_forced = [&] {
    best.push(lane < range.forced() ? pack(kForcedKey, row.block0 + range.forced_block(lane))
                                    : kNone);
  };
  if constexpr (kTogether) {
    __shared__ Entry found[kWarps * kMaxSelect];
    const auto cut = [&](int part) {
      return range.first + static_cast<int>(int64_t{range.end - range.first} * part / kWarps);
    };
    choose<kPerLane>(best, row, cut(warp), cut(warp + 1), want);
    if (lane < out.topk) {
      // Every warp's best on lanes of their own, for a lane's greatest to say something about all.
      const uint64_t mine = lane < best.count() ? best[lane] : kNone;
      found[lane * kWarps + warp] = {.key = key_of(mine), .id = id_of(mine)};
    }
    __syncthreads();
    if (warp > 0) return;
    best = Best(queues[warp], out.topk);
    add_forced();
    // One chunk, since the entries' ids do not ascend.
    static_assert(kMaxSelect * kWarps <= 32 * kPerLane);
    choose<kPerLane>(best, ListedRow{.range = {}, .block0 = 0, .entries = found}, 0,
                     kWarps * out.topk, want);
  } else {
    add_forced();
    choose<kPerLane>(best, row, range.first, range.end, want);
  }
  out.write(best, head, token);
}

}  // namespace msa::cuda::sm90::index
