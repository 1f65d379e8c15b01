// Sizes of the kernels of attention backward.
#pragma once

#include "cuda/sm90/prefill/config.h"

namespace msa::cuda::sm90::backward {

inline constexpr int kBlock = prefill::kBlock;          ///< Bk
inline constexpr int kDim = prefill::kDim;              ///< D
inline constexpr int kMostSlots = prefill::kMostSlots;  ///< largest K
inline constexpr int kWarpgroups = 2;                   ///< that compute
inline constexpr int kThreads = 128 * (1 + kWarpgroups);

// Gradients of keys: a warpgroup owns 64 keys of a block, queries come by in tiles of 64 rows.
inline constexpr int kTileRows = 64;   ///< 64 / G queries of G heads
inline constexpr int kTileStages = 3;  ///< tiles, 32.5 KB: Q, dO, LSE and delta
inline constexpr int kTaskStages = 2;  ///< blocks, 64 KB: K and V

// 65,536 registers: 240 for each computing thread leave 24 for those that load.
inline constexpr int kProducerRegisters = 24;
inline constexpr int kConsumerRegisters = 240;
static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

}  // namespace msa::cuda::sm90::backward
