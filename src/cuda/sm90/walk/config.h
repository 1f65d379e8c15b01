// Sizes of the kernels that walk blocks of keys by lists: prefill, attention backward, the KL.
#pragma once

#include <cstdint>

#include "cuda/sm90/shape.h"

namespace msa::cuda::sm90::walk {

inline constexpr int kRows = 128;      ///< rows of a tile of queries: 128 / G queries of G heads
inline constexpr int kTileRows = 64;   ///< of one that comes by where a block of keys stays
inline constexpr int kWarpgroups = 2;  ///< that compute, beside one that plans and loads
inline constexpr int kThreads = 128 * (1 + kWarpgroups);

// 65,536 registers: 224 for each computing thread leave 56 for those that plan and load.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;
static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

/// Entries of each task but the last of a block with `entries` > 0: about equal shares of at most
/// `most`, in whole tiles of `tile` queries. `most` is a multiple of `tile`.
MSA_HOST_DEVICE constexpr int task_size(int entries, int most, int tile) {
  const int tasks = (entries + most - 1) / most;
  return ((entries + tasks - 1) / tasks + tile - 1) / tile * tile;
}

}  // namespace msa::cuda::sm90::walk
