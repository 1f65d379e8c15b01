// Stand-in for src/cuda/sm90/sizes.h: short calls take several windows, rounds of windows and
// passes over a sequence, `auto` asks the device, and tiles of the index branch have several parts.
// Two families have a number of SMs of their own, which hides the other.
#pragma once

#include <cstdint>

namespace msa::cuda::sm90 {

inline constexpr int kSMs = 132;

namespace prefill {
inline constexpr int64_t kPartBytes = 16 * 16 * 264 * 23;  // 23 queries of 16 heads, K 16
inline constexpr int64_t kRoundWindows = 2;
inline constexpr int kTableBlocks = 5;
inline constexpr int64_t kFewTokens = 0;
}  // namespace prefill

namespace decode {
inline constexpr int kSMs = 34;  // two lists get clusters of 16, 18 none
}  // namespace decode

namespace dense {
inline constexpr int kMaxCtas = 3;  // whole tiles from 1,536 rows on
}  // namespace dense

namespace index {
inline constexpr int kSMs = 5;
inline constexpr int64_t kMostScoreBytes = 16 << 10;
}  // namespace index

}  // namespace msa::cuda::sm90
