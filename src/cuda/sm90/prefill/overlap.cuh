// How much neighbouring queries have in common: a sample of tiles, planned as the union kernel
// plans them. Decides between the orders, on the device, without asking the host.
#pragma once

#include "cuda/sm90/prefill/order.h"
#include "cuda/sm90/prefill/windows.h"
#include "cuda/sm90/walk/tile_queue.cuh"

namespace msa::cuda::sm90::prefill {

/// One warp per sampled tile. Sums of integers: the order in which they come does not matter.
template <int kGroup>
__global__ void __launch_bounds__(32)
    measure_overlap(const __grid_constant__ DeviceBatch batch, const __grid_constant__ Lists lists,
                    int heads_kv, Header* header) {
  __shared__ walk::TileRows<kGroup> tile;
  __shared__ walk::TileBlocks<kGroup> steps;
  walk::TileFinder finder(batch, kRows / kGroup);
  const int number = sampled_tile(static_cast<int>(blockIdx.x), finder.tiles() * heads_kv);
  if (number < 0) return;
  int in_sequence = 0;
  const DeviceSequence s = finder.find(number % finder.tiles(), &in_sequence);
  walk::TilePlanner<kGroup> planner;
  planner.read(batch, lists, s, number / finder.tiles(), in_sequence * planner.kQueries);
  planner.write(batch, &tile, &steps);
  int useful = 0;
  for (int i = static_cast<int>(threadIdx.x); i < steps.count; i += 32)
    useful += __popc(steps.who[i]);
  useful = __reduce_add_sync(0xffffffff, useful);
  if (threadIdx.x != 0) return;
  atomicAdd(&header->overlap.useful, useful);
  for (int w = 0; w < kWarpgroups; ++w)
    atomicAdd(&header->overlap.executed, tile.own_steps[w] * (planner.kQueries / kWarpgroups));
}

}  // namespace msa::cuda::sm90::prefill
