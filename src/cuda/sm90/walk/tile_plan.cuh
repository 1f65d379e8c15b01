// What a CTA does next. A tile is 128 rows of one KV head: kQueries = 128 / G neighbouring queries
// with G heads each. Its plan is the union of the queries' block lists: every block once, with the
// queries that chose it. One warp plans while the others work on the tile before.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/sm90/walk/config.h"
#include "cuda/sm90/walk/lists.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda::sm90::walk {

/// What the consumers must know of a tile.
template <int kGroup>
struct TileRows {
  static constexpr int kQueries = kRows / kGroup;

  int steps;                             ///< blocks of the union; -1: there are no more tiles
  int own_steps[kWarpgroups];            ///< those that a query of this warpgroup chose
  int head;                              ///< KV head
  int kv_len;                            ///< keys of the sequence
  int row[kQueries], visible[kQueries];  ///< query row (-1: none) and how many keys it sees
};

/// The blocks of a tile in the order in which they are read.
///
/// Blocks that both warpgroups need come first, then those of one alone, by turns. So a warpgroup
/// never passes more than one foreign block between two of its own, and both move through the ring
/// at the same pace.
template <int kGroup>
struct TileBlocks {
  static constexpr int kMost = kRows / kGroup * kMostSlots;

  int count;  ///< -1: there are no more tiles
  int head;
  int block[kMost];  ///< counted from the first given one
  union {
    int source[kMost];   ///< packed: first row in k and v; paged: the page
    int first_source;    ///< without lists: of block 0, which all others follow
    int queries[kMost];  ///< while lists are united: what becomes `who`
  };
  uint16_t who[kMost];  ///< bit q: query q of the tile chose it
};

/// A block in the ring, for those who compute.
struct RingBlock {
  int block, who;
};

/// Sorts 32 * kPerLane keys ascending; element r of lane l is number l * kPerLane + r. Bitonic.
template <int kPerLane>
__device__ void sort_in_warp(uint32_t (&key)[kPerLane]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int size = 2; size <= 32 * kPerLane; size *= 2) {
#pragma unroll
    for (int stride = size / 2; stride > 0; stride /= 2) {
#pragma unroll
      for (int r = 0; r < kPerLane; ++r) {
        const int i = lane * kPerLane + r;
        const bool ascending = (i & size) == 0;
        if (stride >= kPerLane) {
          const uint32_t other = __shfl_xor_sync(0xffffffff, key[r], stride / kPerLane);
          const bool lower = (i & stride) == 0;
          key[r] = lower == ascending ? min(key[r], other) : max(key[r], other);
        } else if ((r & stride) == 0) {
          const uint32_t low = min(key[r], key[r | stride]), high = max(key[r], key[r | stride]);
          key[r] = ascending ? low : high;
          key[r | stride] = ascending ? high : low;
        }
      }
    }
  }
}

/// Sum over the lanes up to this one.
__device__ inline int sum_to_lane(int value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffff, value, step);
    if (threadIdx.x % 32 >= step) value += other;
  }
  return value;
}

/// One tile's lists, read and sorted; all lanes of a warp together. write() then writes it down.
template <int kGroup>
class TilePlanner {
 public:
  static constexpr int kQueries = kRows / kGroup;
  static constexpr int kPerLane = kQueries * kMostSlots / 32;

  /// Queries first .. first+kQueries-1 of sequence s, as far as they exist.
  __device__ void read(const DeviceBatch& batch, const Lists& lists, const DeviceSequence& s,
                       int head, int first) {
    const int lane = threadIdx.x % 32;
    s_ = s;
    head_ = head;
    const bool exists = lane < kQueries && first + lane < s.q_len;
    row_ = exists ? s.q_begin + first + lane : -1;
    visible_ = exists ? s.visible(first + lane, kBlock, batch.causal) : 0;
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int query = (32 * r + lane) / kMostSlots;
      const int row = __shfl_sync(0xffffffff, row_, query);
      const int visible = __shfl_sync(0xffffffff, visible_, query);
      const int block = chosen_block</*kRepeats=*/true>(batch, lists, s, head, row, visible);
      key_[r] = block >= 0 ? static_cast<uint32_t>(block) * kKeyQueries + query : kNone;
    }
    sort_in_warp(key_);
  }

  __device__ void write(const DeviceBatch& batch, TileRows<kGroup>* tile,
                        TileBlocks<kGroup>* steps) const {
    const int blocks = unite(steps);
    int own[kWarpgroups];
    order(batch, blocks, steps, own);
    describe(blocks, own, tile, steps);
  }
  /// The same where there are no lists and keys are packed: all blocks that a query sees, one
  /// behind the other. Of `steps` only count, head and first_source.
  __device__ void write_all(TileRows<kGroup>* tile, TileBlocks<kGroup>* steps) const {
    const int last = __popc(__ballot_sync(0xffffffff, row_ >= 0)) - 1;  // sees the most
    const int visible = __shfl_sync(0xffffffff, visible_, last);
    const int blocks = visible / kBlock + (visible % kBlock > 0 ? 1 : 0);
    const int own[kWarpgroups] = {blocks, blocks};
    if (threadIdx.x % 32 == 0) steps->first_source = s_.k_begin;
    describe(blocks, own, tile, steps);
  }

  /// The queries' rows of a [T,Hq,D] tensor. Every lane arrives at `full`. Rows of a query that
  /// does not exist stay as they are.
  __device__ void load_rows(SharedTile<kRows, kDim>& tile, const CUtensorMap* map,
                            ptx::Barrier* full) const {
    const int lane = threadIdx.x % 32;
    ptx::arrive_expect(full, row_ >= 0 ? kGroup * kDim * sizeof(__nv_bfloat16) : 0);
    for (int panel = 0; row_ >= 0 && panel < tile.kPanels; ++panel)
      ptx::load_box(tile.at(lane * kGroup, panel * kPanelColumns), map, full, panel * kPanelColumns,
                    head_ * kGroup, row_, 0);
  }

 private:
  static constexpr uint32_t kNone = ~0u;
  static constexpr uint32_t kKeyQueries = 16;  // a key is block * 16 + query: 28 bits
  static_assert(kQueries <= static_cast<int>(kKeyQueries));

  /// Sorted keys to distinct blocks, ascending, and the queries of each: `block` and `queries`.
  /// Returns their number.
  __device__ int unite(TileBlocks<kGroup>* steps) const {
    const int lane = threadIdx.x % 32;
    uint32_t before = __shfl_up_sync(0xffffffff, key_[kPerLane - 1], 1);
    if (lane == 0) before = kNone;
    uint32_t starts = 0;  // bit r: key r is the first of its block
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const bool start =
          key_[r] != kNone && (before == kNone || key_[r] / kKeyQueries != before / kKeyQueries);
      starts |= static_cast<uint32_t>(start) << r;
      before = key_[r];
      steps->queries[32 * r + lane] = 0;
    }
    __syncwarp();
    const int last = sum_to_lane(__popc(starts));
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      if (key_[r] == kNone) continue;
      const int i = last - __popc(starts >> r >> 1) - 1;
      if (starts >> r & 1) steps->block[i] = static_cast<int>(key_[r] / kKeyQueries);
      atomicOr(&steps->queries[i], 1 << key_[r] % kKeyQueries);
    }
    __syncwarp();
    return __shfl_sync(0xffffffff, last, 31);
  }

  /// Brings the blocks into the order of TileBlocks and says where each one lies.
  __device__ void order(const DeviceBatch& batch, int blocks, TileBlocks<kGroup>* steps,
                        int (&own)[kWarpgroups]) const {
    constexpr int kHalf = kQueries / kWarpgroups;
    const int lane = threadIdx.x % 32;
    int block[kPerLane], who[kPerLane], rank[kPerLane];
    int shared = 0, alone[kWarpgroups] = {};
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      const int i = 32 * r + lane;
      block[r] = i < blocks ? steps->block[i] : 0;
      who[r] = i < blocks ? steps->queries[i] : 0;
      const bool first = (who[r] & ((1 << kHalf) - 1)) != 0, second = (who[r] >> kHalf) != 0;
      const uint32_t below = (1u << lane) - 1;
      const uint32_t both = __ballot_sync(0xffffffff, first && second);
      const uint32_t only_first = __ballot_sync(0xffffffff, first && !second);
      const uint32_t only_second = __ballot_sync(0xffffffff, second && !first);
      rank[r] = first && second ? shared + __popc(both & below)
                : first         ? alone[0] + __popc(only_first & below)
                                : alone[1] + __popc(only_second & below);
      shared += __popc(both);
      alone[0] += __popc(only_first);
      alone[1] += __popc(only_second);
    }
    __syncwarp();
    const int pairs = min(alone[0], alone[1]);
#pragma unroll
    for (int r = 0; r < kPerLane; ++r) {
      if (who[r] == 0) continue;
      const bool first = (who[r] & ((1 << kHalf) - 1)) != 0, second = (who[r] >> kHalf) != 0;
      const int turn = rank[r] < pairs ? 2 * rank[r] + (first ? 0 : 1) : pairs + rank[r];
      const int i = first && second ? rank[r] : shared + turn;
      steps->block[i] = block[r];
      steps->source[i] =
          s_.pages != nullptr ? batch.page(s_, block[r]) : s_.k_begin + block[r] * kBlock;
      steps->who[i] = static_cast<uint16_t>(who[r]);
    }
    own[0] = shared + alone[0];
    own[1] = shared + alone[1];
  }

  /// Everything of the plan but the blocks themselves.
  __device__ void describe(int blocks, const int (&own)[kWarpgroups], TileRows<kGroup>* tile,
                           TileBlocks<kGroup>* steps) const {
    const int lane = threadIdx.x % 32;
    if (lane < kQueries) {
      tile->row[lane] = row_;
      tile->visible[lane] = visible_;
    }
    if (lane == 0) {
      tile->steps = steps->count = blocks;
      tile->head = steps->head = head_;
      tile->kv_len = s_.kv_len;
      for (int w = 0; w < kWarpgroups; ++w) tile->own_steps[w] = own[w];
    }
    __syncwarp();
  }

  DeviceSequence s_{};
  int head_ = 0;
  int row_ = -1, visible_ = 0;  ///< of query `lane`
  uint32_t key_[kPerLane];
};

}  // namespace msa::cuda::sm90::walk
