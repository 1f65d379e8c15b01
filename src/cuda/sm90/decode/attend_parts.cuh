// Partial softmaxes: of the warps of a CTA while it walks its blocks, of the CTAs of a cluster at
// the end.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/decode/attend_shared.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::decode {

/// The maximum of every row over all consumers, from that over each warp's keys.
__device__ inline void share_max(AttendShared& shared, float (&max)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  if (lane % 4 == 0) {
    shared.block_max[row][warp] = max[0];
    shared.block_max[row + 8][warp] = max[1];
  }
  join_consumers();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto* four = reinterpret_cast<const float4*>(shared.block_max[row + 8 * h]);
    const float4 a = four[0], b = four[1];
    max[h] =
        fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
  }
}

/// Stores 16 keys of probabilities where all warps find them.
__device__ inline void share_probabilities(AttendShared& shared, const float (&s)[8]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t p[1][4];
  pack_operand(s, p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint32_t*>(shared.q.at(
        lane / 4 + i % 2 * 8, warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2)) = p[0][i];
  }
  join_consumers();
}

/// Hands this CTA's part of every row to the CTA that finishes it, and waits for what it gets. All
/// consumers.
__device__ inline void exchange_parts(AttendShared& shared, Part* outgoing, const float (&o)[8],
                                      const OnlineSoftmax& softmax, int group, const Split& split) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Part& part = (split.parts > 1 ? outgoing : shared.parts)[lane / 4 + 8 * h];
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<float2*>(&part.o[warp * kColumnsPerWarp + 8 * j + lane % 4 * 2]) = {
          o[4 * j + 2 * h], o[4 * j + 2 * h + 1]};
    float sum = softmax.sum[h];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (lane % 4 == 0) part.sum[warp] = sum;
    if (lane % 4 == 0 && warp == 0) part.max = softmax.max[h];
  }
  join_consumers();
  if (split.parts == 1) return;
  // Half a warp per row. Not as a bulk copy: compute-sanitizer objects to one into the CTA itself.
  const int row = 2 * warp + lane / 16;
  auto* to =
      reinterpret_cast<uint4*>(&shared.parts[split.slot(split.rank, row & (split.rows() - 1))]);
  const auto* from = reinterpret_cast<const uint4*>(&outgoing[row]);
  for (int i = lane % 16; row < group && i < static_cast<int>(sizeof(Part) / 16); i += 16)
    ptx::store_to_cta(row >> split.row_bits, to + i, from[i], &shared.parts_full);
  __syncwarp();
  ptx::wait(&shared.parts_full, 0);
}

/// Combines the parts of this CTA's row `row` and writes it as head h of token t. One warp, four
/// columns per lane.
__device__ inline void finish_row(const AttendShared& shared, const AttendArguments& a, int64_t t,
                                  int64_t h, int row, const Split& split) {
  const int lane = threadIdx.x % 32;
  // Lane p weighs part p.
  float part_max = -INFINITY, part_sum = 0;
  if (lane < split.parts) {
    const Part& part = shared.parts[split.slot(lane, row)];
    part_max = part.max;
    for (float sum : part.sum) part_sum += sum;
  }
  float max = part_max;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, i));
  const float weight = part_sum == 0 ? 0 : ptx::exp2_fast(part_max - max);
  float sum = weight * part_sum;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);

  float o[4] = {};
#pragma unroll 4
  for (int p = 0; p < split.parts; ++p) {
    const float factor = __shfl_sync(0xffffffff, weight, p);
    const float4 part = reinterpret_cast<const float4*>(shared.parts[split.slot(p, row)].o)[lane];
    o[0] += factor * part.x;
    o[1] += factor * part.y;
    o[2] += factor * part.z;
    o[3] += factor * part.w;
  }
  const bool seen = sum != 0;  // it may be NaN, as a score is
  const float inverse = seen ? __fdividef(1, sum) : 0;
  for (float& x : o) x *= inverse;

  const float4 columns{o[0], o[1], o[2], o[3]};
  const int64_t at = a.o.offset(t, h) + 4 * lane;
  if (a.o_is_f32)
    store_columns(columns, static_cast<float*>(a.o.data) + at);
  else
    store_columns(columns, static_cast<__nv_bfloat16*>(a.o.data) + at);
  if (a.lse.data != nullptr && lane == 0)
    *a.lse.at(t, h) = seen ? lse_of(max, sum, a.scale) : -INFINITY;
}

}  // namespace msa::cuda::sm90::decode
