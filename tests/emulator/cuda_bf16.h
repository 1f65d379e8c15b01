// Stand-in for CUDA's bf16.
#pragma once

#include "core/half.h"
#include "cuda_runtime.h"

struct __nv_bfloat16 {
  uint16_t bits;
};
struct alignas(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {{msa::f32_to_bf16(x)}, {msa::f32_to_bf16(y)}};
}
inline float2 __bfloat1622float2(__nv_bfloat162 pair) {
  return {msa::bf16_to_f32(pair.x.bits), msa::bf16_to_f32(pair.y.bits)};
}
inline float __bfloat162float(__nv_bfloat16 x) { return msa::bf16_to_f32(x.bits); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return {msa::f32_to_bf16(x)}; }
inline __nv_bfloat16 __float2bfloat16(float x) { return __float2bfloat16_rn(x); }
