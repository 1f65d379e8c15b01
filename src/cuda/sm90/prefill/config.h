// Sizes of the prefill kernels.
#pragma once

namespace msa::cuda::sm90::prefill {

inline constexpr int kRows = 128;      ///< rows of a tile: 128 / G queries of G heads
inline constexpr int kBlock = 128;     ///< Bk
inline constexpr int kDim = 128;       ///< D
inline constexpr int kMostSlots = 16;  ///< largest K
inline constexpr int kWarpgroups = 2;  ///< that compute, 64 rows each
inline constexpr int kRingSteps = 3;   ///< blocks (K and V, 64 KB) on their way or in use
inline constexpr int kThreads = 128 * (1 + kWarpgroups);

// 65,536 registers: 224 for each computing thread leave 56 for those that plan and load.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;
static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

}  // namespace msa::cuda::sm90::prefill
