// The LSE of the index logits by blocks of keys: every entry leaves the LSE over its block, and
// those of a query's entries are merged in the order of their slots.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/kl/readers.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::kl {

struct IndexLseArgs {
  Readers readers;
  Rows<const __nv_bfloat16> q_idx;  ///< [T,Hi,Di]
  float scale;                      ///< log2(e) / sqrt(Di)
  float* lse_parts;                 ///< [Hkv,T,slots]
};

struct IndexLseShared {
  SharedTile<kBlock, kDim> k_idx;
  Task task;
  ptx::Barrier full;
};

/// A warp: 16 queries against a block.
class QueryTile {
 public:
  __device__ QueryTile(IndexLseShared& shared, const IndexLseArgs& args)
      : shared_(shared), a_(args) {}

  /// Readers first .. first+15 of the task.
  __device__ void run(const Task& task, int first) {
    Reader readers[2];  // of this lane's rows l/4 + 8*h
    int seen[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      readers[h] = a_.readers.at(task, first + lane() / 4 + 8 * h);
      seen[h] = readers[h].row < 0 ? 0 : walk::keys_seen(task, readers[h].row);
      load_row(task, readers[h].row, h);
    }
    OnlineSoftmax softmax;
    float inverse[2], lse[2];
#pragma unroll 1
    for (int key = 0; key < kBlock; key += kKeys) {
      float s[kKeys / 2], max[2], factor[2];
      multiply(s, key);
      const int limit[2] = {seen[0] - key, seen[1] - key};
      if (__any_sync(0xffffffff, limit[0] < kKeys || limit[1] < kKeys)) mask_columns(s, limit);
      row_max(s, max);
      softmax.absorb(s, max, a_.scale, factor);
    }
    softmax.finish(a_.scale, inverse, lse);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (readers[h].row >= 0 && lane() % 4 == 0) a_.lse_parts[readers[h].part] = lse[h];
  }

 private:
  static constexpr int kKeys = kBlock / 2;  ///< at once

  static __device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  /// Half h of the rows as A operands: a lane loads 8 neighbouring columns of each 32, and the quad
  /// deals them out.
  __device__ void load_row(const Task& task, int row, int h) {
    const __nv_bfloat16* from = a_.q_idx.at(row, task.head) + lane() % 4 * 8;
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const uint4 loaded = row < 0 ? uint4{} : *reinterpret_cast<const uint4*>(from + 32 * i);
      uint32_t units[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
      transpose_quad(units);
#pragma unroll
      for (int unit = 0; unit < 4; ++unit) q_[2 * i + unit / 2][unit % 2 * 2 + h] = units[unit];
    }
  }

  /// s[4*j + 2*h + e] = row l/4 + 8*h, key first + 8*j + 2*(l%4) + e.
  __device__ void multiply(float (&s)[kKeys / 2], int first) {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j) {
      float* d = &s[4 * j];
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] = 0;
#pragma unroll
      for (int i = 0; i < kDim / 32; ++i) {
        uint32_t keys[4];
        ptx::load_matrices(keys,
                           shared_.k_idx.at(first + 8 * j + lane() % 8, 32 * i + lane() / 8 * 8));
        ptx::mma(d, q_[2 * i], keys[0], keys[1]);
        ptx::mma(d, q_[2 * i + 1], keys[2], keys[3]);
      }
    }
  }

  IndexLseShared& shared_;
  const IndexLseArgs& a_;
  uint32_t q_[kDim / 16][4];
};

/// CTAs take tasks from a counter; several on an SM hide each other's loads.
__global__ void __launch_bounds__(kLseThreads, 2)
    index_lse_blocks(const __grid_constant__ CUtensorMap k_idx_map,
                     const __grid_constant__ IndexLseArgs args) {
  auto& shared = *reinterpret_cast<IndexLseShared*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    ptx::init_barrier(&shared.full, 1);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  const walk::TaskLists& lists = args.readers.tasks;
  for (uint32_t lap = 0;; lap ^= 1) {
    if (threadIdx.x == 0) {
      const int number = atomicAdd(lists.taken, 1);
      shared.task = {};
      if (number < *lists.count) {
        shared.task = lists.tasks[number];
        load_tile(shared.k_idx, &k_idx_map, &shared.full, shared.task.source, 0, 0);
      }
    }
    __syncthreads();
    const Task& task = shared.task;
    if (task.count == 0) return;
    ptx::wait(&shared.full, lap);
    QueryTile tile(shared, args);
    const int warp = static_cast<int>(threadIdx.x / 32);
    for (int first = warp * kWarpQueries; first < task.count;
         first += kLseThreads / 32 * kWarpQueries)
      tile.run(task, first);
    __syncthreads();
  }
}

}  // namespace msa::cuda::sm90::kl
