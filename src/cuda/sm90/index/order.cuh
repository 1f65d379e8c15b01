// The order of blocks: a higher score first, and of equal scores the lower id.
#pragma once

#include <cmath>
#include <cstdint>

namespace msa::cuda::sm90::index {

inline constexpr int kNoKey = INT32_MIN;      ///< below every score's key
inline constexpr int kForcedKey = INT32_MAX;  ///< above every score's key

/// Integers in the order of scores. NaN counts as -inf, -0 as +0.
__device__ inline int key_of(float score) {
  const int bits = __float_as_int(fmaxf(score, -INFINITY) + 0.F);
  return bits ^ ((bits >> 31) & INT32_MAX);
}
/// The score of a key; +inf for a forced block, -inf for none.
__device__ inline float score_of(int key) {
  if (key == kForcedKey) return INFINITY;
  if (key == kNoKey) return -INFINITY;
  return __int_as_float(key ^ ((key >> 31) & INT32_MAX));
}

/// A chosen block; id -1 and kNoKey for none.
struct alignas(8) Entry {
  int32_t key;
  int32_t id;
};

}  // namespace msa::cuda::sm90::index
