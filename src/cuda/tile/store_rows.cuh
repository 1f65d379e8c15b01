// From accumulators to rows of a tensor (layout of the registers: online_softmax.cuh).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace msa::cuda {

/// Lane q of a quad gives v[i] and gets, as v[i], what lane i gave as v[q].
__device__ inline void transpose_quad(uint32_t (&v)[4]) {
  const auto swap = [](uint32_t& low, uint32_t& high, uint32_t lanes) {
    const bool upper = threadIdx.x & lanes;
    const uint32_t got = __shfl_xor_sync(0xffffffff, upper ? low : high, lanes);
    (upper ? low : high) = got;
  };
  swap(v[0], v[1], 1);
  swap(v[2], v[3], 1);
  swap(v[0], v[2], 2);
  swap(v[1], v[3], 2);
}

// Columns of a row in one lane; 16-byte aligned in memory where they are eight, or f32.

__device__ inline void load_columns(const float* from, float4& x) {
  x = *reinterpret_cast<const float4*>(from);
}
__device__ inline void load_columns(const __nv_bfloat16* from, float4& x) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words.y));
  x = {low.x, low.y, high.x, high.y};
}
__device__ inline void store_columns(const float4& x, float* to) {
  *reinterpret_cast<float4*>(to) = x;
}
__device__ inline void store_columns(const float4& x, __nv_bfloat16* to) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.x, x.y),
                                   __floats2bfloat162_rn(x.z, x.w)};
  *reinterpret_cast<uint2*>(to) = reinterpret_cast<const uint2&>(pairs);
}

/// Row half h -> row[0 .. kCount*2), 16-byte aligned. All lanes of a warp call; a quad whose row is
/// null writes nothing.
template <int kCount>
__device__ inline void store_row(const float (&o)[kCount], int h, __nv_bfloat16* row) {
#pragma unroll
  for (int i = 0; i < kCount / 16; ++i) {  // 32 columns
    uint32_t v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* from = &o[16 * i + 4 * j + 2 * h];
      const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
      v[j] = reinterpret_cast<const uint32_t&>(pair);
    }
    transpose_quad(v);
    if (row != nullptr)
      *reinterpret_cast<uint4*>(row + 32 * i + 8 * (threadIdx.x % 4)) = {v[0], v[1], v[2], v[3]};
  }
}
template <int kCount>
__device__ inline void store_row(const float (&o)[kCount], int h, float* row) {
  if (row == nullptr) return;
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j)
    *reinterpret_cast<float2*>(row + 8 * j + 2 * (threadIdx.x % 4)) = {o[4 * j + 2 * h],
                                                                       o[4 * j + 2 * h + 1]};
}

}  // namespace msa::cuda
