// The shape that the tuned families are written for. No CUDA.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MSA_HOST_DEVICE __host__ __device__
#else
#define MSA_HOST_DEVICE
#endif

namespace msa::cuda::sm90 {

inline constexpr int kDim = 128;       ///< D and Di
inline constexpr int kBlock = 128;     ///< Bk
inline constexpr int kMostSlots = 16;  ///< largest K of most families

}  // namespace msa::cuda::sm90
