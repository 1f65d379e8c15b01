// The K best blocks of a query: which it may choose from, and in what order they are. A higher
// score first, and of equal scores the lower id.
#pragma once

#include <cmath>
#include <cstdint>

#include "msa/problem.h"

namespace msa::cuda {

/// What the caller asks for; see select_blocks in msa/ops.h.
struct Selection {
  int32_t topk;          ///< K
  int32_t init_blocks;   ///< forced at the start of the sequence
  int32_t local_blocks;  ///< forced at the query's end
};

inline Selection selection_of(const Problem& p) {
  return {.topk = p.topk, .init_blocks = p.init_blocks, .local_blocks = p.local_blocks};
}

/// Blocks are counted from the first given one, whose id is block0. The query sees blocks 0 ..
/// visible-1; those of first .. end-1 must win by their score, the others are forced.
struct Candidates {
  int first, end, visible;
  int block0;

  __device__ int forced() const { return first + visible - end; }
  /// i-th forced block.
  __device__ int forced_block(int i) const { return i < first ? i : end + i - first; }
  __device__ bool is_forced(int block) const { return block < first || block >= end; }
};

/// `visible` of the blocks, the query standing in block `last`.
template <class Int>
__device__ inline Candidates candidates(const Selection& selection, int visible, Int last,
                                        int block0) {
  Candidates c;
  c.visible = visible;
  c.end = static_cast<int>(min(max(last - selection.local_blocks + 1, Int{0}), Int{visible}));
  c.first = min(max(selection.init_blocks - block0, 0), c.end);
  c.block0 = block0;
  return c;
}

inline constexpr uint32_t kNoOrder = 0;               ///< below every score's
inline constexpr uint32_t kForcedOrder = 0xffffffff;  ///< above every score's

/// Integers in the order of scores. NaN counts as -inf, -0 as +0.
__device__ inline uint32_t order_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.F);
  return static_cast<uint32_t>(bits ^ ((bits >> 31) | INT32_MIN));
}
/// The score of an order; +inf for a forced block, -inf for none.
__device__ inline float score_of(uint32_t order) {
  if (order == kForcedOrder) return INFINITY;
  if (order == kNoOrder) return -INFINITY;
  const int bits = static_cast<int>(order);
  return __int_as_float(bits ^ (~(bits >> 31) | INT32_MIN));
}

/// A block and its order as one number: greater is better, and no two are equal.
using BlockKey = uint64_t;
inline constexpr BlockKey kNoBlock = 0;  ///< kNoOrder and id -1

__device__ inline BlockKey key_of(uint32_t order, int id) {
  return BlockKey{order} << 32 | ~static_cast<uint32_t>(id);
}
__device__ inline uint32_t order_of(BlockKey key) { return static_cast<uint32_t>(key >> 32); }
__device__ inline int id_of(BlockKey key) { return static_cast<int>(~static_cast<uint32_t>(key)); }

}  // namespace msa::cuda
