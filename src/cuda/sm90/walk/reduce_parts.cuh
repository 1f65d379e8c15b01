// What tasks found out about the keys of a block, added up.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/walk/tasks.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::walk {

inline constexpr int kReduceThreads = 256;  // a warp for each row of the output

struct ReduceArgs {
  DeviceBatch batch;
  TaskLists lists;
  const float* parts;  ///< [parts,128,128]
  Rows<void> out;      ///< [S,H,128] as Out: H = Hkv, or 1 when all heads are added
  int32_t keys;        ///< S
  int32_t heads;       ///< that are added: 1 or Hkv
  float scale;
  Round blocks{};  ///< whose keys are written, nobody's keys with block 0
};

/// Where row k of the keys belongs: row and block of its sequence, key of the block; row -1:
/// nobody's.
struct KeyPlace {
  int row, block, key;
};
__device__ inline KeyPlace place_of_key(const DeviceBatch& batch, const TaskLists& lists, int k) {
  const int b = batch.sequence_of_key(k);
  if (b < 0) return {-1, 0, 0};
  const DeviceSequence s = batch.sequence(b);
  const int token = k - s.k_begin, block = token / kBlock, row = lists.row_begin[b] + block;
  const bool exists = token >= 0 && token < s.kv_len && row < lists.row_begin[b + 1];
  if (!exists) return {-1, 0, 0};
  return {row, block, token % kBlock};
}

/// out[k,h] = scale * sum of the parts of the key's block, for head h = blockIdx.y or for all heads
/// one after the other; zeros for keys that nobody reads.
template <class Out>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_parts(const __grid_constant__ ReduceArgs a) {
  ptx::wait_for_previous_grid();
  const int k = static_cast<int>(blockIdx.x * (kReduceThreads / 32) + threadIdx.x / 32);
  if (k >= a.keys) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const KeyPlace place = place_of_key(a.batch, a.lists, k);
  if (!a.blocks.contains(place.block)) return;
  float4 sum{};
  for (int n = 0; place.row >= 0 && n < a.heads; ++n) {
    const int head = static_cast<int>(blockIdx.y) + n;
    const int end = a.lists.end_part(head, place.row);
#pragma unroll 4
    for (int part = a.lists.first_part(head, place.row); part < end; ++part) {
      const float4 x = *reinterpret_cast<const float4*>(
          a.parts + (int64_t{part} * kBlock + place.key) * kDim + lane * 4);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  }
  sum.x *= a.scale, sum.y *= a.scale, sum.z *= a.scale, sum.w *= a.scale;
  store_columns(sum, a.out.at<Out>(k, blockIdx.y) + lane * 4);
}

}  // namespace msa::cuda::sm90::walk
