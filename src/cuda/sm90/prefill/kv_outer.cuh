// Sparse attention by blocks of keys: a block stays in shared memory while the queries that chose
// it come by. Every (query, slot) leaves a partial result, which merge.cuh adds up. Nothing is
// computed that nobody asked for, but every partial result is written and read once.
//
// A persistent CTA takes tasks (build_lists.cuh) from a counter. One warp loads: the block of a
// task, then its queries, 64 rows (64 / G queries) a tile. Tiles go by turns to two warpgroups.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/prefill/build_lists.cuh"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/windows.h"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::prefill {

struct KvOuterArgs {
  WindowLists lists;
  float* lse;          ///< [Hkv,W,K,G]
  __nv_bfloat16* o;    ///< [Hkv,W,K,G,D]
  int first;           ///< query row of q where the window begins
  int window_tokens;   ///< W
  int heads_kv, topk;  ///< Hkv, K
  float scale;         ///< softmax_scale * log2(e)
  bool paged;
  const std::byte* workspace;
  bool measured;
};

template <int kGroup>
struct KvOuterShared {
  static constexpr int kQueries = kTileRows / kGroup;
  using KvTile = SharedTile<kBlock, kDim>;
  using QTile = SharedTile<kTileRows, kDim>;
  /// A block in the ring, for the consumers. Its tiles take turns, beginning with warpgroup
  /// `first`.
  struct Step {
    int tiles;  ///< -1: there are no more tasks
    int first;
    int keys;  ///< of the block that exist
  };
  /// A query of a tile.
  struct Query {
    int part;  ///< of its first head, counted in rows of o and lse; -1: none
    int seen;  ///< keys of the block that it sees
  };

  KvTile k[kTaskStages], v[kTaskStages];
  QTile q[kTileStages];
  Step step[kTaskStages];
  Query query[kTileStages][kQueries];
  RingBarriers<kTaskStages> k_ring, v_ring;
  RingBarriers<kTileStages> q_ring;
};

/// The tasks of a window, dealt to all CTAs by one counter. One warp; each task is fetched while
/// the one before is worked on.
class TaskQueue {
 public:
  __device__ explicit TaskQueue(const KvOuterArgs& args)
      : a_(args), tasks_(a_.lists.task_count[0]) {
    take();
    fetch();
  }

  /// A task of no entries when all are taken.
  __device__ Task next() {
    const Task task = ahead_;
    fetch();
    return task;
  }

 private:
  /// Lane 0 takes a number; nobody waits for it here.
  __device__ void take() {
    if (threadIdx.x % 32 == 0) number_ = atomicAdd(a_.lists.taken, 1);
  }
  __device__ void fetch() {
    const int number = __shfl_sync(0xffffffff, number_, 0);
    while (head_ < a_.heads_kv && number >= before_ + tasks_) {
      before_ += tasks_;
      tasks_ = ++head_ < a_.heads_kv ? a_.lists.task_count[head_] : 0;
    }
    ahead_ = {};
    if (head_ == a_.heads_kv) return;
    ahead_ = a_.lists.tasks[int64_t{head_} * a_.window_tokens * a_.topk + number - before_];
    take();
  }

  const KvOuterArgs& a_;
  int number_ = 0;
  int head_ = 0;    ///< of the task ahead
  int before_ = 0;  ///< tasks of the heads before
  int tasks_;       ///< of this head
  Task ahead_{};
};

/// One warp: blocks and queries of all tasks of this CTA.
template <int kGroup>
__device__ void load_tasks(KvOuterShared<kGroup>& shared, const KvOuterArgs& args,
                           const CUtensorMap* q_map, const CUtensorMap* k_map,
                           const CUtensorMap* v_map) {
  constexpr int kQueries = kTileRows / kGroup;
  const int lane = threadIdx.x % 32;
  TaskQueue tasks(args);
  RingPosition<kTaskStages> at;
  RingPosition<kTileStages> tile_at;
  const auto load_block = [&](auto& tile, const CUtensorMap* map, ptx::Barrier* full,
                              const Task& task) {
    load_tile(tile, map, full, args.paged ? 0 : task.source, task.head,
              args.paged ? task.source : 0);
  };
  for (Task task = tasks.next(); task.count > 0; task = tasks.next(), at.advance()) {
    if (lane == 0) {
      at.wait_empty(shared.k_ring);
      shared.step[at.stage] = {.tiles = (task.count + kQueries - 1) / kQueries,
                               .first = tile_at.stage % kWarpgroups,
                               .keys = task.keys};
      load_block(shared.k[at.stage], k_map, &shared.k_ring.full[at.stage], task);
      at.wait_empty(shared.v_ring);
      load_block(shared.v[at.stage], v_map, &shared.v_ring.full[at.stage], task);
    }
    __syncwarp();

    const int64_t slots = int64_t{args.window_tokens} * args.topk;
    const Entry* entries = args.lists.entries + task.head * slots + task.begin;
    for (int done = 0; done < task.count; done += 32) {  // a lane per entry
      const bool exists = done + lane < task.count;
      const int entry = exists ? entries[done + lane] : 0;
      const int row = entry / kMostSlots, slot = entry % kMostSlots;
      const int part = ((task.head * args.window_tokens + row) * args.topk + slot) * kGroup;
      for (int first = 0; first < 32 && done + first < task.count;
           first += kQueries, tile_at.advance()) {
        const int n = lane - first;  // query of the tile
        if (n >= 0 && n < kQueries) {
          tile_at.wait_empty(shared.q_ring);
          shared.query[tile_at.stage][n] = {.part = exists ? part : -1,
                                            .seen = exists ? min(task.keys, task.seen + row) : 0};
          ptx::Barrier* full = &shared.q_ring.full[tile_at.stage];
          ptx::arrive_expect(full, exists ? kGroup * kDim * 2 : 0);
          auto& q = shared.q[tile_at.stage];
          for (int panel = 0; exists && panel < q.kPanels; ++panel)
            ptx::load_box(q.at(n * kGroup, panel * kPanelColumns), q_map, full,
                          panel * kPanelColumns, task.head * kGroup, args.first + row, 0);
        }
        __syncwarp();  // no lane a lap ahead
      }
    }
  }
  if (lane == 0) {
    at.wait_empty(shared.k_ring);
    shared.step[at.stage].tiles = -1;
    ptx::arrive(&shared.k_ring.full[at.stage]);
  }
}

/// A warpgroup: its tiles of every task.
template <int kGroup>
class TileConsumer {
 public:
  using Shared = KvOuterShared<kGroup>;

  __device__ TileConsumer(Shared& shared, const KvOuterArgs& args, int warpgroup)
      : shared_(shared), args_(args), warpgroup_(warpgroup) {
    tile_at_.stage = warpgroup;
  }

  __device__ void run() {
    for (;; at_.advance()) {
      at_.wait_full(shared_.k_ring);
      const auto step = read_for_warp(shared_.step[at_.stage]);
      if (step.tiles < 0) return;
      const int own = (step.tiles + (step.first == warpgroup_ ? 1 : 0)) / 2;
      if (own > 0) {
        attend(own, step.keys);
      } else {
        release(&shared_.k_ring.empty[at_.stage]);
        at_.wait_full(shared_.v_ring);
      }
      release(&shared_.v_ring.empty[at_.stage]);
    }
  }

 private:
  /// `tiles` tiles against one block: S = Q K^T of one tile while O = P V of the one before runs.
  __device__ void attend(int tiles, int keys) {
    take_tile();
    start_scores();
    ptx::wgmma_wait<0>();
    take_scores();
    pack_operand(s_, p_);
    at_.wait_full(shared_.v_ring);
    if (keys < kBlock) clear_rows(shared_.v[at_.stage], keys, 1 + warpgroup_);
    for (int left = tiles - 1; left > 0; --left) {
      const int part[2] = {part_[0], part_[1]};
      const float inverse[2] = {inverse_[0], inverse_[1]};
      take_tile();
      start_scores();
      start_values();
      ptx::wgmma_wait<1>();
      take_scores();
      ptx::wgmma_wait<0>();
      store(part, inverse);
      pack_operand(s_, p_);
    }
    release(&shared_.k_ring.empty[at_.stage]);
    start_values();
    ptx::wgmma_wait<0>();
    store(part_, inverse_);
  }

  /// The next tile's queries as operands, and where this thread's two rows belong.
  __device__ void take_tile() {
    tile_at_.wait_full(shared_.q_ring);
    const int lane = threadIdx.x % 32, first = 16 * (threadIdx.x / 32 % 4);
    auto& q = shared_.q[tile_at_.stage];
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::load_matrices(q_[i], q.at(first + lane % 16, 16 * i + lane / 16 * 8));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int half = first + 8 * h;  // eight rows of one query
      const auto query = read_for_warp(shared_.query[tile_at_.stage][half / kGroup]);
      part_[h] = query.part < 0 ? -1 : query.part + half % kGroup + lane / 4;
      seen_[h] = query.seen;
    }
    release(&shared_.q_ring.empty[tile_at_.stage]);
    for (int w = 0; w < kWarpgroups; ++w) tile_at_.advance();
  }

  __device__ void start_scores() {
    ptx::wgmma_fence();
    score_keys(s_, q_, shared_.k[at_.stage]);
    ptx::wgmma_commit();
  }
  /// The scores are there: probabilities, and the LSE of this block.
  __device__ void take_scores() {
    ptx::pin(s_);
    if (__any_sync(0xffffffff, seen_[0] < kBlock || seen_[1] < kBlock)) mask_columns(s_, seen_);
    float block_max[2], factor[2], lse[2];
    row_max(s_, block_max);
    OnlineSoftmax softmax;
    softmax.absorb(s_, block_max, args_.scale, factor);
    softmax.finish(args_.scale, inverse_, lse);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      if (part_[h] >= 0 && threadIdx.x % 4 == 0) args_.lse[part_[h]] = lse[h];
  }

  __device__ void start_values() {
    ptx::wgmma_fence();
    set_values(o_, p_, shared_.v[at_.stage]);
    ptx::wgmma_commit();
  }
  __device__ void store(const int (&part)[2], const float (&inverse)[2]) {
    ptx::pin(o_);
    scale_rows(o_, inverse);
#pragma unroll
    for (int h = 0; h < 2; ++h)
      store_row(o_, h, part[h] >= 0 ? args_.o + int64_t{part[h]} * kDim : nullptr);
  }

  Shared& shared_;
  const KvOuterArgs& args_;
  const int warpgroup_;

  RingPosition<kTaskStages> at_;
  RingPosition<kTileStages> tile_at_;
  int part_[2], seen_[2];  ///< of this thread's two rows
  float inverse_[2];       ///< 1 / sum of the probabilities
  uint32_t q_[kDim / 16][4], p_[kBlock / 16][4];
  float s_[kBlock / 2], o_[kDim / 2];
};

template <int kGroup>
__global__ void __launch_bounds__(kThreads, 1)
    attend_blocks(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map,
                  const __grid_constant__ KvOuterArgs args) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<KvOuterShared<kGroup>*>(memory);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4;  // of a warpgroup
    shared.k_ring.init(kWarps * kWarpgroups);
    shared.v_ring.init(kWarps * kWarpgroups);
    shared.q_ring.init(kWarps, KvOuterShared<kGroup>::kQueries);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  if (!kv_outer_wanted(args.measured, args.workspace)) return;

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<kProducerRegisters>();
    if (warp == 0) load_tasks<kGroup>(shared, args, &q_map, &k_map, &v_map);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    TileConsumer<kGroup>(shared, args, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::prefill
