// What goes into a tile in shared memory: boxes of a tensor, and zeros behind the keys.
#pragma once

#include <cuda.h>

#include "cuda/ptx/copy.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda {

/// Boxes of the tensor from coordinates c1 .. c3 on, one for each panel of the
/// tile. One thread.
template <class Tile>
__device__ inline void load_panels(Tile& tile, const CUtensorMap* map, ptx::Barrier* full, int c1,
                                   int c2, int c3,
                                   ptx::CacheHint hint = ptx::CacheHint::kEvictNormal) {
  for (int panel = 0; panel < tile.kPanels; ++panel)
    ptx::load_box(tile.panel(panel), map, full, panel * kPanelColumns, c1, c2, c3, hint);
}
/// The whole tile, whose bytes the thread announces to `full`.
template <class Tile>
__device__ inline void load_tile(Tile& tile, const CUtensorMap* map, ptx::Barrier* full, int c1,
                                 int c2, int c3,
                                 ptx::CacheHint hint = ptx::CacheHint::kEvictNormal) {
  ptx::arrive_expect(full, tile.kBytes);
  load_panels(tile, map, full, c1, c2, c3, hint);
}

/// Zeros into the rows from `first` on: what lies behind a sequence may be anything, and 0 * NaN is
/// not 0. A warpgroup, or as many threads, which meet at named barrier `barrier`; their products
/// may then read the tile. Others may do the same at the same time.
template <int kThreads = 128, int kRows, int kColumns>
__device__ inline void clear_rows(SharedTile<kRows, kColumns>& tile, int first, uint32_t barrier) {
  constexpr int kUnits = kColumns / 8;
#pragma unroll 1
  for (int i = first * kUnits + static_cast<int>(threadIdx.x % kThreads); i < kRows * kUnits;
       i += kThreads)
    *reinterpret_cast<uint4*>(tile.at(i / kUnits, i % kUnits * 8)) = uint4{};
  ptx::fence_async_proxy();
  ptx::join(barrier, kThreads);
}

}  // namespace msa::cuda
