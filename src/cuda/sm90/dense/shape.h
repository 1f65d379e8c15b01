// Sizes of the dense attention kernels; plain arithmetic, no CUDA.
#pragma once

#include "cuda/sm90/shape.h"
#include "cuda/sm90/sizes.h"

namespace msa::cuda::sm90::dense {

inline constexpr int kStages = 6;     // tiles of K or V in flight
inline constexpr int kTileRows = 64;  // rows of one consumer warpgroup

}  // namespace msa::cuda::sm90::dense
