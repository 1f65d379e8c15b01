// The last step of KV-outer order: the partial results of every query row of a window, one per slot
// of its list, become its output. Sums run over the slots in their order.
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/prefill/build_lists.cuh"
#include "cuda/sm90/prefill/operands.cuh"
#include "cuda/sm90/prefill/single_row.cuh"
#include "cuda/sm90/prefill/windows.h"
#include "cuda/tile/online_softmax.cuh"

namespace msa::cuda::sm90::prefill {

inline constexpr int kMergeThreads = 256;
inline constexpr int kMergeLanes = 16;  ///< of a row: 8 columns each
static_assert(kMergeLanes * 8 == kDim && kMergeLanes == kMostSlots);

struct MergeArgs {
  const uint16_t* chosen;      ///< [Hkv,W]: bit s = slot s has a partial result
  const PartSoftmax* softmax;  ///< [Hkv,W,K,G]
  const __nv_bfloat16* o;      ///< [Hkv,W,K,G,D]
  DeviceBatch batch;
  Lists lists;
  Operands operands;
  Output out;
  float scale;        ///< softmax_scale * log2(e)
  int first, tokens;  ///< query rows of the window
  int window_tokens;  ///< W
  int group, topk;    ///< G, K
  const std::byte* workspace;
  bool measured;
};

/// Columns of a row as f32 -> memory, 16-byte aligned.
__device__ inline void store_columns(const float (&o)[8], __nv_bfloat16* to) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(o[2 * i], o[2 * i + 1]);
    pairs[i] = reinterpret_cast<const uint32_t&>(pair);
  }
  *reinterpret_cast<uint4*>(to) = {pairs[0], pairs[1], pairs[2], pairs[3]};
}
__device__ inline void store_columns(const float (&o)[8], float* to) {
  reinterpret_cast<float4*>(to)[0] = {o[0], o[1], o[2], o[3]};
  reinterpret_cast<float4*>(to)[1] = {o[4], o[5], o[6], o[7]};
}

/// Half a warp: one (query, head), a lane for each slot's softmax and for 8 columns.
template <class Out>
__device__ void merge_row(const MergeArgs& a, int head, int row, int g) {
  const int lane = static_cast<int>(threadIdx.x) % kMergeLanes;
  const int query = head * a.window_tokens + row;
  const uint32_t chosen = a.chosen[query];
  const int64_t part0 = int64_t{query} * a.topk * a.group + g;  // of slot 0

  PartSoftmax own{-INFINITY, 0};
  if (chosen >> lane & 1) own = a.softmax[part0 + lane * a.group];
  float max = own.max;
#pragma unroll
  for (int step = 1; step < kMergeLanes; step *= 2)
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, step));
  const bool counts = own.sum != 0;
  const float weight = counts ? ptx::exp2_fast(own.max - max) : -1;
  float sum = counts ? weight * own.sum : 0;
#pragma unroll
  for (int step = 1; step < kMergeLanes; step *= 2) sum += __shfl_xor_sync(0xffffffff, sum, step);
  const bool empty = sum == 0;

  uint4 parts[kMostSlots];
#pragma unroll
  for (int slot = 0; slot < kMostSlots; ++slot)
    if (chosen >> slot & 1)
      parts[slot] =
          *reinterpret_cast<const uint4*>(a.o + (part0 + slot * a.group) * kDim + lane * 8);
  float o[8] = {};
#pragma unroll
  for (int slot = 0; slot < kMostSlots; ++slot) {
    const float w = __shfl_sync(0xffffffff, weight, slot, kMergeLanes);
    if (w < 0) continue;  // not chosen, or no key counted: its o may hold anything
    const auto* pairs = reinterpret_cast<const __nv_bfloat162*>(&parts[slot]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 columns = __bfloat1622float2(pairs[i]);
      o[2 * i] = fmaf(w, columns.x, o[2 * i]);
      o[2 * i + 1] = fmaf(w, columns.y, o[2 * i + 1]);
    }
  }
  const float inverse = empty ? 0 : 1 / sum;
#pragma unroll
  for (float& x : o) x *= inverse;

  const int64_t token = a.first + row, head_q = head * a.group + g;
  store_columns(o, a.out.o.at<Out>(token, head_q) + lane * 8);
  if (lane == 0 && a.out.lse.data != nullptr)
    *a.out.lse.at(token, head_q) = empty ? -INFINITY : lse_of(max, sum, a.scale);

  // A value that the row does not see, but another query of its tile, may have reached it; and
  // huge logits are not for tiles.
  float zero = 0;
#pragma unroll
  for (const float x : o) zero = fmaf(x, 0.F, zero);
  const uint32_t lanes =
      __ballot_sync(0xffffffff, (zero != 0 && !isnan(sum)) || is_huge_exponent(max));
#pragma unroll 1
  for (int other = 0; lanes != 0 && other < 32; other += kMergeLanes) {
    if ((lanes >> other & 0xffff) == 0) continue;
    __syncwarp();  // what the row's lanes have stored is stored over
    attend_row<Out>(a.batch, a.lists, a.operands, a.out, a.scale, head,
                    __shfl_sync(0xffffffff, static_cast<int>(head_q), other),
                    static_cast<int>(token));
  }
}

/// blockIdx.y is the KV head; along x the (query row, head of the group) pairs of the window.
template <class Out>
__global__ void __launch_bounds__(kMergeThreads)
    merge_parts(const __grid_constant__ MergeArgs args) {
  ptx::wait_for_previous_grid();
  if (!kv_outer_wanted(args.measured, args.workspace)) return;
  const int pair = static_cast<int>(blockIdx.x * kMergeThreads + threadIdx.x) / kMergeLanes;
  const int row = pair / args.group;  // the same in a whole warp
  if (row < args.tokens) merge_row<Out>(args, static_cast<int>(blockIdx.y), row, pair % args.group);
}

}  // namespace msa::cuda::sm90::prefill
