// Sizes of the dense attention kernels; plain arithmetic, no CUDA.
#pragma once

#include "cuda/sm90/shape.h"

namespace msa::cuda::sm90::dense {

inline constexpr int kStages = 6;     // tiles of K or V in flight
inline constexpr int kTileRows = 64;  // rows of one consumer warpgroup
inline constexpr int kMaxCtas = 144;  // SMs of a whole GH100

}  // namespace msa::cuda::sm90::dense
