// Scores of blocks: the one product of the index branch, and what becomes of its results.
//
// A producer warp feeds a ring of shared-memory stages: for each unit of work (work.cuh) the tile's
// queries, one stage per warpgroup, then the blocks of keys, 32 KB each. A warpgroup keeps its
// queries in registers as the A operand, multiplies them with every block and reduces each row of
// 128 scores to its maximum. One row then belongs to one thread, which hands the maximum to a sink:
// BestBlocks keeps the row's best blocks, ScoreMatrix stores it (files of their own).
#pragma once

#include <cuda.h>

#include <cmath>
#include <cstdint>
#include <utility>

#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/index/arguments.cuh"
#include "cuda/sm90/index/config.h"
#include "cuda/sm90/index/work.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda::sm90::index {

using KeyTile = SharedTile<kBlock, kDim>;
inline constexpr int kSteps = kDim / 16;  // of the inner dimension

/// Who sees a block: all queries of the tile all of it, some less, or nobody, for its page is none
/// of the pool's.
enum class Coverage : int32_t { kWhole, kPartial, kMissing };

template <class Shape, class Sink>
struct ScoreShared {
  KeyTile stages[Shape::kStages];
  typename Sink::Storage sink;
  RingBarriers<Shape::kStages> ring;
  Coverage coverage[Shape::kStages];  // of the stages that hold keys
  // The unit in work, and those of which the ring already holds queries.
  static constexpr int kUnits = Shape::kStages / Shape::kWarpgroups + 1;
  Unit units[kUnits];
};

/// The producer warp.
template <class Shape, class Schedule, class Shared>
__device__ void produce(Shared& shared, const ScoreArguments& a) {
  const int lane = threadIdx.x % 32;
  const DeviceBatch& batch = a.grid.batch;
  constexpr auto hint =
      Shape::kReadsOnce ? ptx::CacheHint::kEvictFirst : ptx::CacheHint::kEvictNormal;
  RingPosition<Shape::kStages> at;
  // One stage, whose boxes `load` starts.
  const auto fill = [&](const auto& load) {
    at.wait_empty(shared.ring);
    if (lane == 0) load(shared.stages[at.stage], &shared.ring.full[at.stage]);
    __syncwarp();
    at.advance();
  };
  int number = 0;  // of the unit, modulo kUnits
  const auto hand_out = [&](const Unit& unit) {
    const int queries = Shape::kWarpgroupRows >> a.grid.head_shift;
    for (int w = 0; w < Shape::kWarpgroups; ++w) {
      fill([&](KeyTile& tile, ptx::Barrier* full) {
        if (w == 0) shared.units[number] = unit;
        if (unit.queries == 0) return ptx::arrive(full);
        ptx::arrive_expect(full, Shape::kWarpgroupRows * kDim * 2);
        load_panels(tile, &a.q, full, 0, unit.token + w * queries, 0);
      });
    }
    number = (number + 1) % Shared::kUnits;
  };

  Schedule schedule(a.grid);
  Unit unit;
  DeviceSequence s;
  while (schedule.next(unit, s)) {
    hand_out(unit);
    int pages = 0;  // lane i has the page of block i modulo 32
    for (int j = unit.begin; j < unit.end; ++j) {
      int token = s.k_begin + j * kBlock, page = 0;
      if (s.pages != nullptr) {
        if ((j - unit.begin) % 32 == 0 && j + lane < unit.end) pages = batch.page(s, j + lane);
        page = __shfl_sync(0xffffffff, pages, (j - unit.begin) % 32);
        token = 0;
      }
      fill([&](KeyTile& tile, ptx::Barrier* full) {
        shared.coverage[at.stage] = page < 0                   ? Coverage::kMissing
                                    : j < unit.first_partial() ? Coverage::kWhole
                                                               : Coverage::kPartial;
        if (page < 0) return ptx::arrive(full);
        load_tile(tile, &a.k, full, token, 0, page, hint);
      });
    }
  }
  hand_out(Unit{});
}

/// Known to the compiler to be one number for the whole warp: else it takes the roles' branches for
/// divergent ones, in which it serialises every wgmma.
__device__ inline int warp_number() {
  return __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x) / 32, 0);
}

/// 64 rows of queries as A operands. Rows 16 w .. 16 w + 15 of the tile are warp w's.
__device__ inline void load_queries(uint32_t (&q)[kSteps][4], KeyTile& tile, int row) {
  const int lane = ptx::lane_id();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::load_matrices(q[step], tile.at(row + lane % 16, 16 * step + lane / 16 * 8));
}

/// Starts scores = Q K^T, [64 rows, 128 keys].
__device__ inline void multiply(float (&scores)[64], const uint32_t (&q)[kSteps][4],
                                const KeyTile& keys) {
  ptx::wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSteps; ++step)
    ptx::wgmma(scores, q[step], keys.k_major(0, step), step > 0);
}

/// Which keys of a block count for the thread's rows l/4 and l/4 + 8 of a 64-row tile: all of them,
/// or those before seen[h].
struct AllKeys {
  __device__ bool operator()(int, int) const { return true; }
};
struct KeysBefore {
  int seen[2];
  __device__ bool operator()(int h, int key) const { return key < seen[h]; }
};

/// The maximum of row l/4 + 8*(l%2) of the warp's 16, in lane l: lanes l and l^2 have the same row.
template <class Counts>
__device__ inline float row_maximum(const float (&scores)[64], const Counts& counts) {
  const int lane = threadIdx.x % 32;
  float best[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (counts(i / 2 % 2, i / 4 * 8 + lane % 4 * 2 + i % 2))
      best[i % 4] = fmaxf(best[i % 4], scores[i]);
  }
  const float upper = fmaxf(best[0], best[1]), lower = fmaxf(best[2], best[3]);
  const bool odd = lane % 2 != 0;
  const float kept = odd ? lower : upper, sent = odd ? upper : lower;
  const float both = fmaxf(kept, __shfl_xor_sync(0xffffffff, sent, 1));
  return fmaxf(both, __shfl_xor_sync(0xffffffff, both, 2));
}

/// body(0), ..., body(kCount - 1), each number a constant.
template <int kCount, class Body>
__device__ inline void unrolled(const Body& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

/// A consumer warpgroup.
template <class Shape, class Sink, class Shared>
__device__ void consume(Shared& shared, const ScoreArguments& a) {
  constexpr int kTiles = Shape::kTiles;
  const int warpgroup = warp_number() / 4, warp = warp_number() % 4, lane = threadIdx.x % 32;
  // Lane l owns row l/4 + 8*(l%2) of the warp's 16 in tile l%4/2, if there is such a tile.
  const int warp_row = Shape::kWarpgroupRows * warpgroup + 16 * warp;
  const int own_tile = lane % 4 / 2;
  const int own_row = own_tile < kTiles ? warp_row + 64 * own_tile + lane / 4 + lane % 2 * 8 : -1;

  Sink sink(shared.sink, a);
  RingPosition<Shape::kStages> at;
  for (int number = 0;; number = (number + 1) % Shared::kUnits) {
    uint32_t q[kTiles][kSteps][4];
#pragma unroll 1
    for (int w = 0; w < Shape::kWarpgroups; ++w, at.advance()) {
      at.wait_full(shared.ring);
      if (w == warpgroup) {
#pragma unroll
        for (int i = 0; i < kTiles; ++i)
          load_queries(q[i], shared.stages[at.stage], 64 * i + 16 * warp);
      }
      release(&shared.ring.empty[at.stage]);
    }
    const Unit& unit = shared.units[number];
    if (unit.queries == 0) return;
    sink.begin(unit, own_row);

    const int begin = unit.begin, end = unit.end;
    float score = 0;  // of the thread's row and the block before
    for (int block = begin; block < end; ++block, at.advance()) {
      float scores[kTiles][64], best[kTiles];
      at.wait_full(shared.ring);
      const Coverage coverage = shared.coverage[at.stage];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        multiply(scores[i], q[i], shared.stages[at.stage]);
        ptx::wgmma_commit();
      }
      if (block > begin) sink.take(unit, block - 1, score);  // while the products run
      unrolled<kTiles>([&](auto tile) {
        constexpr int i = decltype(tile)::value;
        ptx::wgmma_wait<kTiles - 1 - i>();
        ptx::pin(scores[i]);
        if constexpr (i == kTiles - 1) release(&shared.ring.empty[at.stage]);
        if (coverage == Coverage::kWhole) {
          best[i] = row_maximum(scores[i], AllKeys{});
        } else {
          KeysBefore before{};
          for (int h = 0; h < 2 && coverage == Coverage::kPartial; ++h) {
            const int query = (warp_row + 64 * i + lane / 4 + 8 * h) >> a.grid.head_shift;
            before.seen[h] = min(unit.seen + query, unit.kv_len) - block * kBlock;
          }
          best[i] = row_maximum(scores[i], before);
        }
      });
      score = own_tile == 0 ? best[0] : best[kTiles - 1];
    }
    if (begin < end) sink.take(unit, end - 1, score);
    sink.end(unit, own_row);
  }
}

template <class Shape, class Schedule, class Sink>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    score_blocks(const __grid_constant__ ScoreArguments a) {
  auto& shared = *reinterpret_cast<ScoreShared<Shape, Sink>*>(ptx::dynamic_shared);
  const int warp = warp_number();
  constexpr int kProducer = 4 * Shape::kWarpgroups;
  if (threadIdx.x == 0) {
    shared.ring.init(4 * Shape::kWarpgroups);
    ptx::fence_barrier_init();
  }
  if (warp == kProducer) {
    ptx::prefetch_map(&a.q);
    ptx::prefetch_map(&a.k);
  }
  __syncthreads();
  ptx::allow_next_grid();
  if (warp >= kProducer) {
    if constexpr (Shape::kWarpgroups > 1) ptx::give_registers<40>();
    if (warp == kProducer) produce<Shape, Schedule>(shared, a);
  } else {
    if constexpr (Shape::kWarpgroups > 1) ptx::take_registers<232>();
    consume<Shape, Sink>(shared, a);
  }
}

}  // namespace msa::cuda::sm90::index
