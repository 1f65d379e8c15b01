// Sizes of the kernels of attention backward.
#pragma once

#include "cuda/sm90/walk/config.h"

namespace msa::cuda::sm90::backward {

using walk::kRows, walk::kThreads, walk::kTileRows, walk::kWarpgroups;

// Gradients of keys: a warpgroup owns 64 keys of a block, queries come by in tiles of kTileRows
// rows, 64 / G queries of G heads.
inline constexpr int kTileStages = 3;  ///< tiles, 32.5 KB: Q, dO, LSE and delta
inline constexpr int kTaskStages = 2;  ///< blocks, 64 KB: K and V

// 65,536 registers: 240 for each computing thread leave 24 for those that load.
inline constexpr int kLoaderRegisters = 24;
inline constexpr int kKeyRegisters = 240;
static_assert(128 * (kLoaderRegisters + kWarpgroups * kKeyRegisters) <= 65536);

}  // namespace msa::cuda::sm90::backward
