// What the entries of a query left becomes its outputs. Sums run over the slots in their order, and
// over the rounds, which go on where the one before stopped.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/walk/lists.cuh"
#include "cuda/sm90/walk/reduce_parts.cuh"
#include "cuda/softmax_scale.h"

namespace msa::cuda::sm90::kl {

/// Which entries there are.
struct Slots {
  DeviceBatch batch;
  walk::Lists lists;  ///< ids null: slot s is block kMostSlots * round + s of all that are seen
  int32_t round;
  int32_t slots;  ///< places of a (head, query)

  /// Bit s = slot s of the query has been worked on. All lanes of a warp together.
  __device__ uint32_t of(int head, int row) const {
    const int b = batch.warp_sequence_of(row);
    if (b < 0) return 0;
    const DeviceSequence s = batch.sequence(b);
    const int visible = s.visible(row - s.q_begin, kBlock, batch.causal);
    if (lists.ids.data != nullptr) {
      const int block = walk::chosen_block(batch, lists, s, head, row, visible);
      return __ballot_sync(0xffffffff, block >= 0) & 0xffff;
    }
    const int blocks = (visible >> 7) + ((visible & 127) != 0) - round * kMostSlots;
    return blocks >= kMostSlots ? 0xffff : (1u << max(blocks, 0)) - 1;
  }
};

struct MergeLseArgs {
  Slots slots;
  const float* lse_parts;  ///< [Hkv,T,slots]
  Rows<float> lse;         ///< [T,Hi]
};

/// A warp for each row, blockIdx.y is the head.
__global__ void __launch_bounds__(kMergeThreads) merge_lse(const __grid_constant__ MergeLseArgs a) {
  ptx::wait_for_previous_grid();
  const int row = static_cast<int>(blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32);
  const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % 32;
  const int tokens = a.slots.batch.tokens;
  if (row >= tokens) return;
  const uint32_t slots = a.slots.of(head, row);
  float& out = *a.lse.at(row, head);
  const int64_t part0 = (int64_t{head} * tokens + row) * a.slots.slots;
  float lse = slots >> lane & 1 ? a.lse_parts[part0 + lane] : -INFINITY;
  if (a.slots.round > 0 && lane == kMostSlots) lse = out;
  float max = lse;
  for (int step = 1; step < 32; step *= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, step));
  float sum = max == -INFINITY ? 0 : ptx::exp2_fast((lse - max) * kLog2E);
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  if (lane == 0) out = max == -INFINITY ? max : fmaf(log2f(sum), kLn2, max);
}

struct MergeKlArgs {
  Slots slots;
  const float* dq_parts;  ///< [Hkv,T,slots,Di], or null: kl alone
  const float* before;    ///< [Hkv,T,Di] sums of the rounds before, or null
  Rows<void> dq;          ///< [T,Hi,Di] as Out, or sums as `before` has them
  const float* kl_parts;  ///< [Hkv,T,slots] in units of log2, or null
  Rows<float> kl;         ///< [T,Hi]
};

/// dq of a row: 4 columns a lane.
template <class Out>
__device__ void merge_gradient(const MergeKlArgs& a, int head, int row, uint32_t slots) {
  const int64_t query = int64_t{head} * a.slots.batch.tokens + row;
  const int column = 4 * (static_cast<int>(threadIdx.x) % 32);
  const float* from = a.dq_parts + query * a.slots.slots * kDim + column;
  float4 parts[kMostSlots];
#pragma unroll
  for (int slot = 0; slot < kMostSlots; ++slot)
    if (slots >> slot & 1) parts[slot] = *reinterpret_cast<const float4*>(from + slot * kDim);
  float4 sum{};
  if (a.before != nullptr) sum = *reinterpret_cast<const float4*>(a.before + query * kDim + column);
#pragma unroll
  for (int slot = 0; slot < kMostSlots; ++slot) {
    if (!(slots >> slot & 1)) continue;
    sum.x += parts[slot].x, sum.y += parts[slot].y;
    sum.z += parts[slot].z, sum.w += parts[slot].w;
  }
  store_columns(sum, a.dq.at<Out>(row, head) + column);
}

/// A warp for each row, blockIdx.y is the head.
template <class Out>
__global__ void __launch_bounds__(kMergeThreads) merge_kl(const __grid_constant__ MergeKlArgs a) {
  ptx::wait_for_previous_grid();
  const int row = static_cast<int>(blockIdx.x * (kMergeThreads / 32) + threadIdx.x / 32);
  const int head = static_cast<int>(blockIdx.y), lane = static_cast<int>(threadIdx.x) % 32;
  const int tokens = a.slots.batch.tokens;
  if (row >= tokens) return;
  const uint32_t slots = a.slots.of(head, row);
  if (a.dq_parts != nullptr) merge_gradient<Out>(a, head, row, slots);
  if (a.kl_parts == nullptr) return;
  const int64_t part0 = (int64_t{head} * tokens + row) * a.slots.slots;
  float sum = slots >> lane & 1 ? a.kl_parts[part0 + lane] : 0;
  for (int step = 1; step < 32; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  float& out = *a.kl.at(row, head);
  if (lane == 0) out = fmaf(sum, kLn2, a.slots.round > 0 ? out : 0);
}

}  // namespace msa::cuda::sm90::kl
