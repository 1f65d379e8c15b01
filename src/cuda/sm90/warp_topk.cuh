// The best of a row of candidates, chosen by one warp, which holds many of them at a time in
// registers. Those that may be among the best queue up in shared memory, where everyone's rank is
// counted when the queue is full. Nothing is sorted.
#pragma once

#include <cstdint>

#include "cuda/topk.cuh"

namespace msa::cuda::sm90 {

/// One warp's best `want` candidates, in `queue[0 .. count-1]`, best first after rank().
class WarpTopK {
 public:
  static constexpr int kQueue = 64;

  __device__ WarpTopK(BlockKey* queue, int want) : queue_(queue), want_(want) {}

  __device__ int count() const { return count_; }
  __device__ BlockKey operator[](int i) const { return queue_[i]; }
  /// The worst of `want` that were there at the last rank(): others must be better.
  /// Before, kNoBlock.
  __device__ BlockKey worst() const { return worst_; }

  /// A candidate per lane, or kNoBlock, in any order.
  __device__ void push(BlockKey candidate) {
    const uint32_t better = __ballot_sync(0xffffffff, candidate > worst_);
    if (candidate > worst_) queue_[count_ + __popc(better & ((1U << lane()) - 1))] = candidate;
    count_ += __popc(better);
    if (count_ > kQueue - 32) rank();
  }

  /// Leaves the best `want`, in order.
  __device__ void rank() {
    __syncwarp();
    const BlockKey low = lane() < count_ ? queue_[lane()] : kNoBlock;
    const BlockKey high = lane() + 32 < count_ ? queue_[lane() + 32] : kNoBlock;
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
  BlockKey* queue_;  // shared memory, kQueue
  int want_;
  int count_ = 0;
  BlockKey worst_ = kNoBlock;
};

/// A score that at least `want` of the warp's scores reach, near the `want`-th greatest; -inf if
/// there are fewer.
__device__ inline float reached_by(float score, int want) {
  // The lane's number makes keys distinct; it costs the bound its last five bits.
  const uint32_t key = (order_of(score) & ~31U) | static_cast<uint32_t>(WarpTopK::lane());
  int rank = 0;
#pragma unroll
  for (int i = 0; i < 32; ++i) rank += __shfl_sync(0xffffffff, key, i) > key;
  const uint32_t holder = __ballot_sync(0xffffffff, rank == want - 1);
  const uint32_t bound = __shfl_sync(0xffffffff, key & ~31U, __ffs(static_cast<int>(holder)) - 1);
  return score_of(max(bound, order_of(-INFINITY)));
}

/// Candidates begin .. end-1 of a row into `best`, of which at most `want` can get there. A lane
/// holds kPerLane scores at a time.
template <int kPerLane, class Row>
__device__ void choose(WarpTopK& best, const Row& row, int begin, int end, int want) {
  constexpr int kChunk = 32 * kPerLane;
  const int lane = WarpTopK::lane();
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
      best.push(hits != 0 ? key_of(row.order(j), row.id(j)) : kNoBlock);
      hits &= hits - 1;
    }
    // Later candidates have higher ids: they must be better.
    if (best.worst() != kNoBlock) bound = score_of(order_of(best.worst()) + 1);
  }
  best.rank();
}

}  // namespace msa::cuda::sm90
