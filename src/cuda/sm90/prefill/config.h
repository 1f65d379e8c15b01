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

// KV-outer order: a tile is 64 rows, the work of one warpgroup, which does one thing after the
// other: so 152 registers are enough, and three of them hide each other's waits.
inline constexpr int kTileRows = 64;
inline constexpr int kTileWarpgroups = 3;
inline constexpr int kTaskStages = 2;         ///< blocks (K and V, 64 KB) on their way or in use
inline constexpr int kMostTaskQueries = 256;  ///< of one task
inline constexpr int kMostTaskTiles = kMostTaskQueries / (kTileRows / 16);  ///< G 16
inline constexpr int kTileThreads = 128 * (1 + kTileWarpgroups);
inline constexpr int kTileRegisters = 152;
static_assert(kTileWarpgroups < 4, "a loading warp for each, and one for blocks");
static_assert(128 * (kProducerRegisters + kTileWarpgroups * kTileRegisters) <= 65536);

}  // namespace msa::cuda::sm90::prefill
