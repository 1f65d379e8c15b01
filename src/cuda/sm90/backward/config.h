// Sizes of the kernels of attention backward.
#pragma once

#include "cuda/sm90/prefill/config.h"

namespace msa::cuda::sm90::backward {

using prefill::kBlock, prefill::kDim, prefill::kMostSlots;
using prefill::kTileRows;
using prefill::kWarpgroups, prefill::kThreads;

// Gradients of keys: a warpgroup owns 64 keys of a block, queries come by in tiles of kTileRows
// rows, 64 / G queries of G heads.
inline constexpr int kTileStages = 3;  ///< tiles, 32.5 KB: Q, dO, LSE and delta
inline constexpr int kTaskStages = 2;  ///< blocks, 64 KB: K and V

// 65,536 registers: 240 for each computing thread leave 24 for those that load.
inline constexpr int kProducerRegisters = 24;
inline constexpr int kConsumerRegisters = 240;
static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

}  // namespace msa::cuda::sm90::backward
