// Which tile of queries a CTA plans next (tile_plan.cuh).
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/walk/tile_plan.cuh"

namespace msa::cuda::sm90::walk {

/// Finds the sequence of a tile; all lanes of a warp together. Tiles never cross sequences. Rows of
/// padding are a last sequence without keys. Asked for ascending tiles it walks the batch once.
class TileFinder {
 public:
  __device__ TileFinder(const DeviceBatch& batch, int queries) : batch_(batch), queries_(queries) {
    load(0, 0);
    while (first_ + 32 <= batch_.sequences) load(first_ + 32, end());
    tiles_ = end();
    load(0, 0);
  }

  __device__ int tiles() const { return tiles_; }

  /// The sequence of `tile` < tiles(), and the tile's number in it.
  __device__ DeviceSequence find(int tile, int* tile_in_sequence) {
    if (tile < before_) load(0, 0);
    while (tile >= end()) load(first_ + 32, end());
    const int begin = before_ + last_ - own_;
    const uint32_t found = __ballot_sync(0xffffffff, tile >= begin && tile < begin + own_);
    const int lane = __ffs(found) - 1;
    *tile_in_sequence = tile - __shfl_sync(0xffffffff, begin, lane);
    return sequence(first_ + lane);
  }

 private:
  __device__ DeviceSequence sequence(int b) const {
    if (b < batch_.sequences) return batch_.sequence(b);
    DeviceSequence padding{};
    padding.q_begin = batch_.clamp(batch_.cu_seqlens_q[batch_.sequences], 0, batch_.tokens);
    padding.q_len = batch_.tokens - padding.q_begin;
    return padding;
  }

  /// Looks at sequences first .. first+31, ahead of which there are `before` tiles.
  __device__ void load(int first, int before) {
    const int b = first + static_cast<int>(threadIdx.x % 32);
    first_ = first;
    before_ = before;
    own_ = b <= batch_.sequences ? (sequence(b).q_len + queries_ - 1) / queries_ : 0;
    last_ = sum_to_lane(own_);
  }
  __device__ int end() const { return before_ + __shfl_sync(0xffffffff, last_, 31); }

  const DeviceBatch& batch_;
  int queries_;
  int tiles_ = 0;
  int first_ = 0, before_ = 0;  ///< sequence of lane 0, and the tiles ahead of it
  int own_ = 0, last_ = 0;      ///< tiles of this lane's sequence, and of those up to it
};

/// The tiles of a batch, dealt to all CTAs by one counter, which starts at zero; all lanes of a
/// warp together.
template <int kGroup>
class TileQueue {
 public:
  /// `last_first`: the tiles of a head in descending order.
  __device__ TileQueue(const DeviceBatch& batch, const Lists& lists, int heads_kv, int* counter,
                       bool last_first = false)
      : batch_(batch),
        lists_(lists),
        finder_(batch, kRows / kGroup),
        tiles_(finder_.tiles() * heads_kv),
        counter_(counter),
        last_first_(last_first) {}

  /// Has the planner read the next tile; false if all are taken.
  __device__ bool next(TilePlanner<kGroup>* planner) {
    const int lane = threadIdx.x % 32;
    const int number = __shfl_sync(0xffffffff, lane == 0 ? atomicAdd(counter_, 1) : 0, 0);
    if (number >= tiles_) return false;
    // Neighbours in time are neighbours in the text: they share blocks in L2.
    const int head = number / finder_.tiles(), turn = number % finder_.tiles();
    int tile = 0;
    const DeviceSequence s = finder_.find(last_first_ ? finder_.tiles() - 1 - turn : turn, &tile);
    planner->read(batch_, lists_, s, head, tile * planner->kQueries);
    return true;
  }

 private:
  const DeviceBatch& batch_;
  const Lists& lists_;
  TileFinder finder_;
  int tiles_;
  int* counter_;
  bool last_first_;
};

}  // namespace msa::cuda::sm90::walk
