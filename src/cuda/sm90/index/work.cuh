// Who computes what: a CTA's producer warp cuts the batch into units, a tile of query rows against
// a range of blocks, and hands them to the consumers with the queries.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/index/candidates.cuh"

namespace msa::cuda::sm90::index {

/// Blocks are counted from the sequence's first given one.
struct Unit {
  int32_t token;       ///< row of q of the tile's first query
  int32_t queries;     ///< that exist; 0 = no more units
  int32_t begin, end;  ///< blocks to walk
  int32_t seen;        ///< seen_keys() of the first query; one more per query
  int32_t kv_len;
  int32_t block0;  ///< global id of block 0
  int32_t tile;    ///< number of the tile
  int32_t split;   ///< which part of the tile's blocks

  /// From here on some query does not see every key.
  __device__ int first_partial() const { return max(min(seen, kv_len), 0) / kBlock; }
};

/// What the schedules need to know.
struct Grid {
  DeviceBatch batch;
  Selection selection;
  int32_t head_shift;  ///< log2 Hi
  int32_t max_blocks;  ///< columns of a buffer of scores; blocks behind it are not there
  int32_t splits;      ///< parts of a tile's blocks
  int32_t tiles;       ///< tile_numbers()
};

/// Blocks that must be scored for queries 0 .. queries-1 of s: the last one's, since what the
/// others need is among them.
__device__ inline int blocks_to_walk(const Grid& grid, const DeviceSequence& s, int queries) {
  if (queries <= 0) return 0;
  return candidates(grid.selection, seen_keys(s, queries - 1), s.kv_len, s.block0, grid.max_blocks)
      .end;
}

__device__ inline Unit tile_unit(const DeviceSequence& s, int first, int queries) {
  return {.token = s.q_begin + first,
          .queries = min(queries, s.q_len - first),
          .begin = 0,
          .end = 0,
          .seen = seen_keys(s, first),
          .kv_len = s.kv_len,
          .block0 = s.block0,
          .tile = 0,
          .split = 0};
}

/// One unit per CTA: CTA i does tile i % tiles of split i / tiles, the last tile first, since later
/// queries see more keys. CTAs that run at the same time read the same keys. Rows of padding come
/// as tiles without keys.
template <int kRows>
class OneTile {
 public:
  __device__ explicit OneTile(const Grid& grid) : grid_(grid) {}

  __device__ bool next(Unit& unit, DeviceSequence& s) {
    if (done_) return false;
    done_ = true;
    const int tile = grid_.tiles - 1 - static_cast<int>(blockIdx.x) % grid_.tiles;
    const int split = static_cast<int>(blockIdx.x) / grid_.tiles;
    const int queries = kRows >> grid_.head_shift;
    const DeviceBatch& batch = grid_.batch;
    int b = 0, behind = batch.sequences + 1;  // the sequence lies in [b, behind)
    while (behind - b > 1) {
      const int middle = (b + behind) / 2;
      (first_tile(middle, queries) <= tile ? b : behind) = middle;
    }
    s = b < batch.sequences ? batch.sequence(b) : padding();
    const int first = (tile - first_tile(b, queries)) * queries;
    if (first < 0 || first >= s.q_len) return false;
    unit = tile_unit(s, first, queries);
    const int blocks = blocks_to_walk(grid_, s, first + unit.queries);
    unit.begin = static_cast<int>(int64_t{blocks} * split / grid_.splits);
    unit.end = static_cast<int>(int64_t{blocks} * (split + 1) / grid_.splits);
    unit.tile = tile;
    unit.split = split;
    return true;
  }

 private:
  __device__ int q_begin(int b) const {
    return grid_.batch.clamp(grid_.batch.cu_seqlens_q[b], 0, grid_.batch.tokens);
  }
  __device__ int first_tile(int b, int queries) const { return q_begin(b) / queries + b; }
  __device__ DeviceSequence padding() const {
    DeviceSequence s{};
    s.q_begin = q_begin(grid_.batch.sequences);
    s.q_len = grid_.batch.tokens - s.q_begin;
    return s;
  }

  const Grid& grid_;
  bool done_ = false;
};

/// The batch's blocks laid end to end, an equal share for every CTA. For few query rows, whose time
/// is that of reading keys, whatever the lengths of the sequences.
template <int kRows>
class EqualShares {
 public:
  __device__ explicit EqualShares(const Grid& grid)
      : grid_(grid), queries_(kRows >> grid.head_shift) {
    const int lane = static_cast<int>(threadIdx.x) % 32, sequences = grid.batch.sequences;
    uint32_t all = 0;
    for (int b = lane; b < sequences; b += 32) all += cost(b);
    all = __reduce_add_sync(0xffffffff, all);
    const uint32_t share = all / gridDim.x, more = all % gridDim.x;  // one more for the first CTAs
    const uint32_t begin = blockIdx.x * share + min(blockIdx.x, more);
    left_ = static_cast<int>(share + (blockIdx.x < more ? 1 : 0));
    // The sequence in which the share begins, 32 at a time.
    uint32_t before = 0;
    for (int first = 0; first < sequences && left_ > 0; first += 32) {
      const uint32_t mine = first + lane < sequences ? cost(first + lane) : 0;
      uint32_t upto = mine;
      for (int i = 1; i < 32; i *= 2) {
        const uint32_t other = __shfl_up_sync(0xffffffff, upto, i);
        if (lane >= i) upto += other;
      }
      const uint32_t behind = __ballot_sync(0xffffffff, before + upto > begin);
      if (behind != 0) {
        const int found = __ffs(static_cast<int>(behind)) - 1;
        b_ = first + found;
        at_ = static_cast<int>(begin - before - __shfl_sync(0xffffffff, upto - mine, found));
        return;
      }
      before += __shfl_sync(0xffffffff, upto, 31);
    }
    left_ = 0;
  }

  __device__ bool next(Unit& unit, DeviceSequence& s) {
    for (; left_ > 0 && b_ < grid_.batch.sequences; ++b_, at_ = 0) {
      s = grid_.batch.sequence(b_);
      const int walk = blocks_to_walk(grid_, s, s.q_len);
      if (at_ >= walk * tiles(s)) continue;
      unit = tile_unit(s, at_ / walk * queries_, queries_);
      unit.begin = at_ % walk;
      unit.end = min(walk, unit.begin + left_);
      left_ -= unit.end - unit.begin;
      at_ += unit.end - unit.begin;
      return true;
    }
    return false;
  }

 private:
  __device__ int tiles(const DeviceSequence& s) const {
    return (s.q_len + queries_ - 1) / queries_;
  }
  /// Blocks of all tiles of sequence b.
  __device__ uint32_t cost(int b) const {
    const DeviceSequence s = grid_.batch.sequence(b);
    return static_cast<uint32_t>(blocks_to_walk(grid_, s, s.q_len) * tiles(s));
  }

  const Grid& grid_;
  int queries_;  ///< of a tile
  int left_;     ///< blocks of the share still to hand out
  int at_ = 0;   ///< position in sequence b_
  int b_ = 0;
};

}  // namespace msa::cuda::sm90::index
