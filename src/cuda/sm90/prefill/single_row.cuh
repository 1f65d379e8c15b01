// One row of the output, key by key, without tensor cores: no value that the row does not attend is
// multiplied by its zero probability, so a NaN or an infinity there cannot reach it, and logits may
// be of any size. The kernels come here with rows whose results are no finite numbers, or whose
// logits are huge.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/prefill/operands.cuh"

namespace msa::cuda::sm90::prefill {

/// Four neighbouring columns.
__device__ inline float4 load_four(const __nv_bfloat16* from) {
  const uint2 words = *reinterpret_cast<const uint2*>(from);
  const float2 low = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words.x));
  const float2 high = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(words.y));
  return {low.x, low.y, high.x, high.y};
}
__device__ inline void store_four(const float4& x, __nv_bfloat16* to) {
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(to);
  pairs[0] = __floats2bfloat162_rn(x.x, x.y);
  pairs[1] = __floats2bfloat162_rn(x.z, x.w);
}
__device__ inline void store_four(const float4& x, float* to) {
  *reinterpret_cast<float4*>(to) = x;
}

/// o and lse of query row `row`, query head `head` of KV head `kv_head`; a warp, four columns a
/// lane. `scale` is softmax_scale * log2(e).
template <class Out>
__device__ void attend_row(const DeviceBatch& batch, const Lists& lists, const Operands& operands,
                           const Output& out, float scale, int kv_head, int head, int row) {
  const int lane = static_cast<int>(threadIdx.x % 32), column = 4 * lane;
  const int b = batch.warp_sequence_of(row);
  const DeviceSequence s = b >= 0 ? batch.sequence(b) : DeviceSequence{};
  const int visible = b >= 0 ? s.visible(row - s.q_begin, kBlock, batch.causal) : 0;
  const int chosen = chosen_block(batch, lists, s, kv_head, row, visible);
  const float4 q = load_four(operands.q + row * operands.q_token + head * operands.q_head + column);

  float max = -INFINITY, sum = 0;
  float4 o{};
#pragma unroll 1
  for (int slot = 0; slot < kMostSlots; ++slot) {
    const int block = __shfl_sync(0xffffffff, chosen, slot);
    if (block < 0) continue;
    const __nv_bfloat16* k = operands.k.block(batch, s, block, kv_head) + column;
    const __nv_bfloat16* v = operands.v.block(batch, s, block, kv_head) + column;
    const int keys = min(visible - block * kBlock, kBlock);
#pragma unroll 1
    for (int key = 0; key < keys; ++key, k += operands.k.token, v += operands.v.token) {
      const float4 x = load_four(k), y = load_four(v);
      float score = fmaf(q.x, x.x, fmaf(q.y, x.y, fmaf(q.z, x.z, q.w * x.w)));
#pragma unroll
      for (int step = 16; step > 0; step /= 2) score += __shfl_xor_sync(0xffffffff, score, step);
      if (score == -INFINITY) continue;
      const float before = max;
      max = fmaxf(max, score);
      const float keep = ptx::exp2_fast((before - max) * scale);
      const float p = ptx::exp2_fast((score - max) * scale);
      sum = fmaf(sum, keep, p);
      o = {fmaf(o.x, keep, p * y.x), fmaf(o.y, keep, p * y.y), fmaf(o.z, keep, p * y.z),
           fmaf(o.w, keep, p * y.w)};
    }
  }
  const float inverse = max == -INFINITY ? 0 : 1 / sum;
  if (lane == 0 && out.lse != nullptr)
    out.lse[row * out.lse_token + head * out.lse_head] =
        max == -INFINITY ? -INFINITY : fmaf(max, scale, log2f(sum)) * 0.693147180559945309F;
  store_four({o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse},
             static_cast<Out*>(out.o) + row * out.o_token + head * out.o_head + column);
}

}  // namespace msa::cuda::sm90::prefill
