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
#include "cuda/softmax_scale.h"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::prefill {

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
  float4 q;
  load_columns(operands.q.at(row, head) + column, q);

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
      float4 x, y;
      load_columns(k, x);
      load_columns(v, y);
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
  if (lane == 0 && out.lse.data != nullptr)
    *out.lse.at(row, head) = max == -INFINITY ? -INFINITY : fmaf(max, scale, log2f(sum)) * kLn2;
  store_columns({o.x * inverse, o.y * inverse, o.z * inverse, o.w * inverse},
                out.o.at<Out>(row, head) + column);
}

}  // namespace msa::cuda::sm90::prefill
