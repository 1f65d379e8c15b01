// What the fast CPU backends take: bounds of their stack buffers and insertion lists.
#pragma once

#include <cstdint>

namespace msa::cpu {

inline constexpr int64_t kMaxHeadDim = 256;
inline constexpr int64_t kMaxGroup = 64;
inline constexpr int64_t kMaxIndexHeads = 256;
inline constexpr int64_t kMaxTopK = 256;

}  // namespace msa::cpu
