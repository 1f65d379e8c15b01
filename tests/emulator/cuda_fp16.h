// Stand-in for CUDA's fp16.
#pragma once

#include "core/half.h"
#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) { return msa::f16_to_f32(x.bits); }
inline __half __float2half_rn(float x) { return {msa::f32_to_f16(x)}; }
