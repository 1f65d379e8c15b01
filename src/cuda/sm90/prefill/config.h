// Sizes of the prefill kernels.
#pragma once

#include "cuda/sm90/walk/config.h"

namespace msa::cuda::sm90::prefill {

using walk::kConsumerRegisters, walk::kProducerRegisters;
using walk::kRows, walk::kThreads, walk::kTileRows, walk::kWarpgroups;

inline constexpr int kRingSteps = 3;  ///< blocks (K and V, 64 KB) on their way or in use

// KV-outer order: a tile is 64 rows, the work of one warpgroup, which does one thing after the
// other: so 152 registers are enough, and three of them hide each other's waits.
inline constexpr int kTileWarpgroups = 3;
inline constexpr int kTaskStages = 2;         ///< blocks (K and V, 64 KB) on their way or in use
inline constexpr int kMostTaskQueries = 256;  ///< of one task
inline constexpr int kMostTaskTiles = kMostTaskQueries / (kTileRows / 16);  ///< G 16
inline constexpr int kTileThreads = 128 * (1 + kTileWarpgroups);
inline constexpr int kTileRegisters = 152;
static_assert(kTileWarpgroups < 4, "a loading warp for each, and one for blocks");
static_assert(128 * (kProducerRegisters + kTileWarpgroups * kTileRegisters) <= 65536);

}  // namespace msa::cuda::sm90::prefill
