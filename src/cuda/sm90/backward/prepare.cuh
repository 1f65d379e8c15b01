// What the gradients need of every query row and head beside q and d_o: lse and delta.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/query_gradient.h"
#include "cuda/softmax_scale.h"
#include "cuda/tile/huge_lse.cuh"

namespace msa::cuda::sm90::backward {

inline constexpr int kPrepareThreads = 256;
inline constexpr int kPrepareLanes = 16;  ///< of a row: 8 columns each
static_assert(kPrepareLanes * 8 == kDim);

struct PrepareArgs {
  Rows<const void> o;             ///< [T,Hq,D] as O
  Rows<const __nv_bfloat16> d_o;  ///< [T,Hq,D]
  Rows<const float> lse;          ///< [T,Hq]
  float* row_terms;  ///< [T,Hkv,2,G]: lse * log2(e), less its slack; +inf: no key seen; delta
  Words* words;      ///< `huge` becomes true where an LSE is
  int32_t heads_q, group;
};

__device__ inline void load_columns(const __nv_bfloat16* from, float (&x)[8]) {
  const uint4 words = *reinterpret_cast<const uint4*>(from);
  const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(pairs[i]);
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}
__device__ inline void load_columns(const float* from, float (&x)[8]) {
  const float4 low = reinterpret_cast<const float4*>(from)[0];
  const float4 high = reinterpret_cast<const float4*>(from)[1];
  x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
  x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

/// Half a warp per (query row, head): delta = sum over d of o * d_o. blockIdx.x is the query row.
template <class O>
__global__ void __launch_bounds__(kPrepareThreads) prepare(const __grid_constant__ PrepareArgs a) {
  const int lane = static_cast<int>(threadIdx.x) % kPrepareLanes;
  const int64_t token = blockIdx.x;
  // Whole warps together: a half without a head computes the last one's again.
  const int pair0 = static_cast<int>(threadIdx.x) / kPrepareLanes;
  constexpr int kPairs = kPrepareThreads / kPrepareLanes;
  for (int first = 0; first < a.heads_q; first += kPairs) {
    const int head = min(first + pair0, a.heads_q - 1);
    float o[8], d_o[8], delta = 0;
    load_columns(a.o.at<const O>(token, head) + lane * 8, o);
    load_columns(a.d_o.at(token, head) + lane * 8, d_o);
#pragma unroll
    for (int i = 0; i < 8; ++i) delta = fmaf(o[i], d_o[i], delta);
#pragma unroll
    for (int step = 1; step < kPrepareLanes; step *= 2)
      delta += __shfl_xor_sync(0xffffffff, delta, step);
    if (lane != 0 || first + pair0 >= a.heads_q) continue;
    const float lse = *a.lse.at(token, head);
    const int kv_head = head / a.group, g = head % a.group;
    float* to = a.row_terms + (token * (a.heads_q / a.group) + kv_head) * 2 * a.group + g;
    to[0] = lse == -INFINITY ? INFINITY : less_slack(lse) * kLog2E;
    if (is_huge(lse)) a.words->huge = 1;
    to[a.group] = delta;
  }
}

}  // namespace msa::cuda::sm90::backward
