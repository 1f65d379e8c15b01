// Gradients of keys and values: a block stays in shared memory while the queries that read it come
// by. All products are transposed, rows are keys: probabilities and their gradients leave the first
// two as the A operand of the last two, and nothing goes through shared memory.
//
//   S^T = K Q^T,  dP^T = V dO^T,  P = exp2(S c - lse),  dS = P (dP - delta)
//   dV += P^T dO,  dK += dS^T Q
//
// A persistent CTA takes tasks (walk/tasks.h) from a counter. One warp loads: the block of a task,
// then its queries, 64 rows (64 / G queries) a tile. Two warpgroups own 64 keys each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/query_gradient.h"
#include "cuda/sm90/walk/tasks.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::backward {

struct KeyGradientArgs {
  walk::TaskLists tasks;
  walk::InverseLists lists;
  const float* row_terms;  ///< [T,Hkv,2,G], see prepare.cuh
  const Words* words;
  float* dk;     ///< [parts,128,128], without the softmax scale
  float* dv;     ///< [parts,128,128]
  int tokens;    ///< T
  int heads_kv;  ///< Hkv
  float scale;   ///< softmax_scale * log2(e)
};

template <int kGroup>
struct KeyGradientShared {
  static constexpr int kQueries = kTileRows / kGroup;
  using KvTile = SharedTile<kBlock, kDim>;
  using QTile = SharedTile<kTileRows, kDim>;
  /// A block in the ring, for the consumers.
  struct Work {
    int tiles;  ///< -1: there are no more tasks
    int keys;   ///< of the block that exist
    int part;
  };
  /// lse and delta of a query's heads, as in KeyGradientArgs::row_terms.
  struct alignas(16) Terms {
    float lse[kGroup], delta[kGroup];
  };

  KvTile k[kTaskStages], v[kTaskStages];
  QTile q[kTileStages], d_o[kTileStages];
  Terms terms[kTileStages][kQueries];
  int seen[kTileStages][kQueries];  ///< keys of the block that a query sees
  Work work[kTaskStages];
  RingBarriers<kTaskStages> task_ring;
  RingBarriers<kTileStages> tile_ring;
};

/// One warp: blocks and queries of all tasks of this CTA.
template <int kGroup>
__device__ void load_tasks(KeyGradientShared<kGroup>& shared, const KeyGradientArgs& args,
                           const Maps& maps) {
  using Shared = KeyGradientShared<kGroup>;
  constexpr int kQueries = Shared::kQueries;
  constexpr uint32_t kRowBytes = 2 * kGroup * kDim * sizeof(__nv_bfloat16);  // of q and d_o
  constexpr uint32_t kTermBytes = sizeof(typename Shared::Terms);
  const int lane = threadIdx.x % 32;
  walk::WorkQueue<walk::TaskSource> tasks(args.tasks);
  RingPosition<kTaskStages> at;
  RingPosition<kTileStages> tile_at;
  for (walk::Task task = tasks.next(); task.count > 0; task = tasks.next(), at.advance()) {
    at.wait_empty(shared.task_ring);
    if (lane == 0) {
      shared.work[at.stage] = {
          .tiles = (task.count + kQueries - 1) / kQueries, .keys = task.keys, .part = task.part};
      ptx::Barrier* full = &shared.task_ring.full[at.stage];
      auto &k = shared.k[at.stage], &v = shared.v[at.stage];
      ptx::arrive_expect(full, k.kBytes + v.kBytes);
      for (int panel = 0; panel < k.kPanels; ++panel) {
        const int column = panel * kPanelColumns;
        ptx::load_box(k.panel(panel), &maps.k, full, column, task.source, task.head, 0);
        ptx::load_box(v.panel(panel), &maps.v, full, column, task.source, task.head, 0);
      }
    }
    for (int done = 0; done < task.count; done += 32) {  // a lane per query
      const int entry = done + lane;
      const int row = entry < task.count ? walk::query_of(task, args.lists, entry) : -1;
      for (int first = 0; first < 32 && done + first < task.count;
           first += kQueries, tile_at.advance()) {
        tile_at.wait_empty(shared.tile_ring);
        const int n = ptx::lane_id() - first;  // query of the tile; `lane` costs a register
        auto &q = shared.q[tile_at.stage], &d_o = shared.d_o[tile_at.stage];
        ptx::Barrier* full = &shared.tile_ring.full[tile_at.stage];
        if (n >= 0 && n < kQueries) {
          shared.seen[tile_at.stage][n] = row < 0 ? 0 : walk::keys_seen(task, row);
          ptx::arrive_expect(full, kRowBytes + (row < 0 ? 0 : kTermBytes));
          // Missing queries come from behind the tensor, as zeros; they see no key.
          const int source = row < 0 ? args.tokens : row;
          for (int panel = 0; panel < q.kPanels; ++panel) {
            const int column = panel * kPanelColumns;
            ptx::load_box(q.at(n * kGroup, column), &maps.q, full, column, task.head * kGroup,
                          source, 0);
            ptx::load_box(d_o.at(n * kGroup, column), &maps.d_o, full, column, task.head * kGroup,
                          source, 0);
          }
          if (row >= 0)
            ptx::load_bytes(
                &shared.terms[tile_at.stage][n],
                args.row_terms + (int64_t{row} * args.heads_kv + task.head) * 2 * kGroup,
                kTermBytes, full);
        }
        __syncwarp();  // no lane a lap ahead
      }
    }
  }
  at.wait_empty(shared.task_ring);
  if (lane == 0) {
    shared.work[at.stage].tiles = -1;
    ptx::arrive(&shared.task_ring.full[at.stage]);
  }
}

/// A warpgroup: its 64 keys of every task.
template <int kGroup>
class KeyGradientConsumer {
 public:
  using Shared = KeyGradientShared<kGroup>;

  __device__ KeyGradientConsumer(Shared& shared, const KeyGradientArgs& args, int warpgroup)
      : shared_(shared), args_(args), first_key_(64 * warpgroup), huge_(args.words->huge != 0) {}

  __device__ void run() {
    for (;; at_.advance()) {
      at_.wait_full(shared_.task_ring);
      const auto work = read_for_warp(shared_.work[at_.stage]);
      if (work.tiles < 0) return;
      add_tiles(work.tiles);
      release(&shared_.task_ring.empty[at_.stage]);
      store(work);
    }
  }

 private:
  /// dK and dV of a task: while probabilities are computed, dP runs; while their gradients are, dV;
  /// and behind dK, S of the next tile.
  __device__ void add_tiles(int tiles) {
#pragma unroll
    for (float& x : dk_) x = 0;
#pragma unroll
    for (float& x : dv_) x = 0;
    tile_at_.wait_full(shared_.tile_ring);
    start_scores();
    ptx::wgmma_wait<0>();
    ptx::pin(s_);
    for (int left = tiles - 1; left > 0; --left) {
      add_tile();
      const int before = tile_at_.stage;
      tile_at_.advance();
      tile_at_.wait_full(shared_.tile_ring);
      start_scores();
      ptx::wgmma_wait<0>();
      ptx::pin(s_);
      end_tile(before);
    }
    add_tile();
    ptx::wgmma_wait<0>();
    end_tile(tile_at_.stage);
    tile_at_.advance();
  }
  __device__ void end_tile(int stage) {
    ptx::pin(dk_);
    ptx::pin(dv_);
    ptx::arrive(&shared_.tile_ring.empty[stage]);
  }

  __device__ void start_scores() {
    ptx::wgmma_fence();
    score_keys(s_, shared_.k[at_.stage], first_key_, shared_.q[tile_at_.stage]);
    ptx::wgmma_commit();
  }
  __device__ void start_gradients() {
    ptx::wgmma_fence();
    score_keys(dp_, shared_.v[at_.stage], first_key_, shared_.d_o[tile_at_.stage]);
    ptx::wgmma_commit();
  }

  /// S of a tile is there: starts its share of dV and dK.
  __device__ void add_tile() {
    start_gradients();
    find_probabilities();
    uint32_t p[kTileRows / 16][4];
    pack_operand(s_, p);
    ptx::wgmma_fence();
    add_values(dv_, p, shared_.d_o[tile_at_.stage]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    ptx::pin(dp_);
    find_gradients();
    pack_operand(dp_, ds_);
    ptx::wgmma_fence();
    add_values(dk_, ds_, shared_.q[tile_at_.stage]);
    ptx::wgmma_commit();
  }

  /// Query of the tile, and its head, to which elements 4*j .. 4*j+3 belong: columns 8*j + 2*(l%4)
  /// and the one behind it.
  static __device__ constexpr int query_of_step(int j) { return 8 * j / kGroup; }
  __device__ static int head_of_step(int j) {
    return 8 * j % kGroup + 2 * static_cast<int>(threadIdx.x % 4);
  }

  __device__ void find_probabilities() {
    const auto& terms = shared_.terms[tile_at_.stage];
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const float2 lse =
          *reinterpret_cast<const float2*>(&terms[query_of_step(j)].lse[head_of_step(j)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* s = &s_[4 * j + 2 * h];
        s[0] = fmaf(s[0], args_.scale, -lse.x);
        s[1] = fmaf(s[1], args_.scale, -lse.y);
      }
    }
    if (huge_) {
#pragma unroll
      for (float& x : s_) x = x > 0 ? 0 : x;
    }
#pragma unroll
    for (float& x : s_) x = ptx::exp2_fast(x);
    if (hides_keys()) mask(s_);
  }
  __device__ void find_gradients() {
    const auto& terms = shared_.terms[tile_at_.stage];
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const float2 delta =
          *reinterpret_cast<const float2*>(&terms[query_of_step(j)].delta[head_of_step(j)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int i = 4 * j + 2 * h;
        dp_[i] = s_[i] * (dp_[i] - delta.x);
        dp_[i + 1] = s_[i + 1] * (dp_[i + 1] - delta.y);
      }
    }
    if (hides_keys()) mask(dp_);
  }

  /// Whether a query of the tile does not see all of the block.
  __device__ bool hides_keys() const {
    bool hides = false;
#pragma unroll
    for (int n = 0; n < Shared::kQueries; ++n)
      hides = hides || shared_.seen[tile_at_.stage][n] < kBlock;
    return hides;
  }
  /// Keys that a query does not see: 0, whatever was computed.
  __device__ void mask(float (&x)[kTileRows / 2]) const {
    const int key = first_key_ + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const int seen = shared_.seen[tile_at_.stage][query_of_step(j)];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * j + i] = key + i / 2 * 8 < seen ? x[4 * j + i] : 0;
    }
  }

  __device__ void store(const typename Shared::Work& work) {
    const int key = first_key_ + 16 * (threadIdx.x / 32 % 4) + threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool exists = key + 8 * h < work.keys;
      const int64_t to = (int64_t{work.part} * kBlock + key + 8 * h) * kDim;
      store_row(dk_, h, exists ? args_.dk + to : nullptr);
      store_row(dv_, h, exists ? args_.dv + to : nullptr);
    }
  }

  Shared& shared_;
  const KeyGradientArgs& args_;
  const int first_key_;  ///< of this warpgroup, in a block
  const bool huge_;      ///< Words::huge

  RingPosition<kTaskStages> at_;
  RingPosition<kTileStages> tile_at_;
  uint32_t ds_[kTileRows / 16][4];
  float s_[kTileRows / 2], dp_[kTileRows / 2];
  float dk_[kDim / 2], dv_[kDim / 2];
};

template <int kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    key_gradient(const __grid_constant__ Maps maps, const __grid_constant__ KeyGradientArgs args) {
  auto& shared = *reinterpret_cast<KeyGradientShared<kGroup>*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kWarpgroups;  // warps
    shared.task_ring.init(kReaders);
    shared.tile_ring.init(32 * kReaders, KeyGradientShared<kGroup>::kQueries);
    ptx::fence_barrier_init();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<kLoaderRegisters>();
    if (warp == 0) load_tasks<kGroup>(shared, args, maps);
  } else {
    ptx::take_registers<kKeyRegisters>();
    KeyGradientConsumer<kGroup>(shared, args, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::backward
