// Sparse attention by blocks of keys: a block stays in shared memory while the queries that chose
// it come by. Every (query, slot) leaves a partial result, which merge.cuh adds up. Nothing is
// computed that nobody asked for, but every partial result is written and read once.
//
// A persistent CTA takes tasks (build_lists.cuh) from a counter. A task's queries go by tiles of 64
// rows (64 / G queries), by turns to three warpgroups. One warp takes tasks and loads their blocks;
// each warpgroup has a warp that loads its tiles, one ahead of it.
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
#include "cuda/sm90/walk/work_queue.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda::sm90::prefill {

struct KvOuterArgs {
  WindowLists lists;
  PartSoftmax* softmax;  ///< [Hkv,W,K,G]
  int first;             ///< query row of q where the window begins
  int window_tokens;     ///< W
  int heads_kv, topk;    ///< Hkv, K
  float scale;           ///< softmax_scale * log2(e)
  bool paged;
  const std::byte* workspace;
  bool measured;
};

/// A task in the ring. Its tiles take turns, beginning with warpgroup `first`.
struct Work {
  WindowTask task;  ///< of no entries: there are no more tasks
  int first;

  /// The first tile of a warpgroup; its others follow kTileWarpgroups apart.
  __device__ int first_tile(int warpgroup) const {
    return (warpgroup + kTileWarpgroups - first) % kTileWarpgroups;
  }
};

template <int kGroup>
struct KvOuterShared {
  static constexpr int kQueries = kTileRows / kGroup;  ///< of a tile
  using KvTile = SharedTile<kBlock, kDim>;
  using Tile = SharedTile<kTileRows, kDim>;
  /// A query of a tile.
  struct Query {
    int part;  ///< (head, row, slot) as one number; -1: none
    int seen;  ///< keys of the block that it sees
  };

  KvTile k[kTaskStages], v[kTaskStages];
  Tile q[kTileWarpgroups], o[kTileWarpgroups];
  Work work[kTaskStages];
  Query query[kTileWarpgroups][kQueries];
  RingBarriers<kTaskStages> work_ring, k_ring, v_ring;  ///< work: for the loading warps
  RingBarriers<1> q_ring[kTileWarpgroups];

  static __device__ int tiles(const WindowTask& task) {
    return (task.count + kQueries - 1) / kQueries;
  }
};

/// The tasks of a window, head after head, for a WorkQueue.
class WindowTasks {
 public:
  using Work = WindowTask;

  __device__ explicit WindowTasks(const KvOuterArgs& args)
      : a_(args), tasks_(a_.lists.task_count[0]) {}

  __device__ int* counter() const { return a_.lists.taken; }
  __device__ bool read(int number, WindowTask* task) {
    while (head_ < a_.heads_kv && number >= before_ + tasks_) {
      before_ += tasks_;
      tasks_ = ++head_ < a_.heads_kv ? a_.lists.task_count[head_] : 0;
    }
    if (head_ == a_.heads_kv) return false;
    *task = a_.lists.tasks[int64_t{head_} * a_.window_tokens * a_.topk + number - before_];
    return true;
  }

 private:
  const KvOuterArgs& a_;
  int head_ = 0;    ///< of the task ahead
  int before_ = 0;  ///< tasks of the heads before
  int tasks_;       ///< of this head
};

/// One warp: takes the tasks of this CTA and loads their blocks.
template <int kGroup>
__device__ void load_blocks(KvOuterShared<kGroup>& shared, const KvOuterArgs& args,
                            const CUtensorMap* k_map, const CUtensorMap* v_map) {
  walk::WorkQueue<WindowTasks> tasks(args);
  RingPosition<kTaskStages> at;
  for (int turns = 0;; at.advance()) {
    const WindowTask task = tasks.next();
    if (threadIdx.x % 32 == 0) {
      at.wait_empty(shared.k_ring);
      at.wait_empty(shared.work_ring);
      shared.work[at.stage] = {task, turns % kTileWarpgroups};
      ptx::arrive(&shared.work_ring.full[at.stage]);
      if (task.count == 0) {
        ptx::arrive(&shared.k_ring.full[at.stage]);
      } else {
        const int row = args.paged ? 0 : task.source, page = args.paged ? task.source : 0;
        load_tile(shared.k[at.stage], k_map, &shared.k_ring.full[at.stage], row, task.head, page);
        at.wait_empty(shared.v_ring);
        load_tile(shared.v[at.stage], v_map, &shared.v_ring.full[at.stage], row, task.head, page);
      }
    }
    __syncwarp();
    if (task.count == 0) return;
    turns += shared.tiles(task);
  }
}

/// A warpgroup's next tile: the queries of a task that `entries` name. One thread.
template <int kGroup, int kQueries>
__device__ void load_queries(KvOuterShared<kGroup>& shared, const KvOuterArgs& args,
                             const CUtensorMap* q_map, int warpgroup, RingPosition<1> at,
                             const WindowTask& task, const int (&entries)[kQueries], int count) {
  auto& ring = shared.q_ring[warpgroup];
  at.wait_empty(ring);
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
    const int row = entries[n] / kMostSlots, slot = entries[n] % kMostSlots;
    const int part = (task.head * args.window_tokens + row) * args.topk + slot;
    shared.query[warpgroup][n] = {.part = n < count ? part : -1,
                                  .seen = n < count ? min(task.keys, task.seen + row) : 0};
  }
  ptx::arrive_expect(&ring.full[0], count * kGroup * kDim * 2);
  auto& q = shared.q[warpgroup];
#pragma unroll
  for (int n = 0; n < kQueries; ++n) {
    const int row = args.first + entries[n] / kMostSlots;
    for (int panel = 0; n < count && panel < q.kPanels; ++panel)
      ptx::load_box(q.at(n * kGroup, panel * kPanelColumns), q_map, &ring.full[0],
                    panel * kPanelColumns, task.head * kGroup, row, 0);
  }
}

/// One warp: the tiles of a warpgroup, of every task.
template <int kGroup>
__device__ void load_tiles(KvOuterShared<kGroup>& shared, const KvOuterArgs& args,
                           const CUtensorMap* q_map, int warpgroup) {
  constexpr int kQueries = KvOuterShared<kGroup>::kQueries;
  const int lane = threadIdx.x % 32;
  RingPosition<kTaskStages> at;
  RingPosition<1> tile_at;
  for (;; at.advance()) {
    at.wait_full(shared.work_ring);
    const auto work = read_for_warp(shared.work[at.stage]);
    release(&shared.work_ring.empty[at.stage]);
    const WindowTask& task = work.task;
    if (task.count == 0) return;

    const int64_t slots = int64_t{args.window_tokens} * args.topk;
    const Entry* entries = args.lists.entries + task.head * slots + task.begin;
    const auto entry_of = [&](int tile) {  // a lane per query
      const int i = tile * kQueries + lane;
      return lane < kQueries && i < task.count ? int{entries[i]} : 0;
    };
    int tile = work.first_tile(warpgroup), ahead = entry_of(tile);
    for (; tile < shared.tiles(task); tile += kTileWarpgroups, tile_at.advance()) {
      int of_tile[kQueries];
#pragma unroll
      for (int n = 0; n < kQueries; ++n) of_tile[n] = __shfl_sync(0xffffffff, ahead, n);
      ahead = entry_of(tile + kTileWarpgroups);  // arrives while this tile is waited for
      if (lane == 0)
        load_queries(shared, args, q_map, warpgroup, tile_at, task, of_tile,
                     min(kQueries, task.count - tile * kQueries));
      __syncwarp();
    }
  }
}

/// A warpgroup: its tiles of every task.
template <int kGroup>
class TileConsumer {
 public:
  using Shared = KvOuterShared<kGroup>;

  __device__ TileConsumer(Shared& shared, const KvOuterArgs& args, const CUtensorMap* o_map,
                          int warpgroup)
      : shared_(shared), args_(args), o_map_(o_map), warpgroup_(warpgroup) {}

  __device__ void run() {
    for (;; at_.advance()) {
      at_.wait_full(shared_.k_ring);
      const auto work = read_for_warp(shared_.work[at_.stage]);
      if (work.task.count == 0) break;
      const int first = work.first_tile(warpgroup_);
      for (int tile = first; tile < shared_.tiles(work.task); tile += kTileWarpgroups)
        attend(tile == first, work.task.keys);
      release(&shared_.k_ring.empty[at_.stage]);
      at_.wait_full(shared_.v_ring);
      release(&shared_.v_ring.empty[at_.stage]);
    }
    send();
    if (threadIdx.x % 32 == 0) ptx::wait_stores();
  }

 private:
  /// The next tile against the block, of which `keys` exist; the first one waits for V.
  __device__ void attend(bool first, int keys) {
    take_tile();
    ptx::wgmma_fence();
    score_keys(s_, q_, shared_.k[at_.stage]);
    ptx::wgmma_commit();
    send();  // of the tile before: what keep() stored has arrived by now
    ptx::wgmma_wait<0>();
    take_scores();
    pack_operand(s_, p_);
    if (first) {
      at_.wait_full(shared_.v_ring);
      if (keys < kBlock) clear_rows(shared_.v[at_.stage], keys, 1 + warpgroup_);
    }
    ptx::wgmma_fence();
    set_values(o_, p_, shared_.v[at_.stage]);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    keep();
  }

  /// The tile's queries as operands, and where this thread's two rows belong.
  __device__ void take_tile() {
    auto& ring = shared_.q_ring[warpgroup_];
    tile_at_.wait_full(ring);
    const int lane = threadIdx.x % 32, first = first_row();
    auto& q = shared_.q[warpgroup_];
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::load_matrices(q_[i], q.at(first + lane % 16, 16 * i + lane / 16 * 8));
    typename Shared::Query query;  // of eight rows, or of all sixteen
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (8 * h % kGroup == 0)
        query = read_for_warp(shared_.query[warpgroup_][(first + 8 * h) / kGroup]);
      part_[h] = query.part;
      seen_[h] = query.seen;
    }
    release(&ring.empty[0]);
    tile_at_.advance();
  }

  /// The scores are there: probabilities, and their softmax.
  __device__ void take_scores() {
    ptx::pin(s_);
    if (__any_sync(0xffffffff, seen_[0] < kBlock || seen_[1] < kBlock)) mask_columns(s_, seen_);
    float block_max[2], factor[2];
    row_max(s_, block_max);
    OnlineSoftmax softmax;
    softmax.absorb<false>(s_, block_max, args_.scale, factor);
    softmax.add_quad();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int g = (first_row() + 8 * h) % kGroup + threadIdx.x % 32 / 4;
      if (part_[h] >= 0 && threadIdx.x % 4 == 0)
        args_.softmax[int64_t{part_[h]} * kGroup + g] = {softmax.max[h], softmax.sum[h]};
    }
  }

  /// O into shared memory, every warp its 16 rows, for send().
  __device__ void keep() {
    ptx::pin(o_);
    const int lane = threadIdx.x % 32, first = first_row();
    auto& o = shared_.o[warpgroup_];
    uint32_t packed[kDim / 16][4];
    pack_operand(o_, packed);
    if (lane == 0) ptx::wait_stores();  // of the tile before
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::store_matrices(o.at(first + lane % 16, 16 * i + lane / 16 * 8), packed[i]);
#pragma unroll
    for (int h = 0; h < 2; ++h) kept_[h] = part_[h];
  }
  /// What keep() left, to where it belongs.
  __device__ void send() {
    ptx::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) {
      auto& o = shared_.o[warpgroup_];
#pragma unroll
      for (int n = 0; n < 16 / kGroup; ++n) {
        for (int panel = 0; kept_[n] >= 0 && panel < o.kPanels; ++panel)
          ptx::store_box(o_map_, o.at(first_row() + n * kGroup, panel * kPanelColumns),
                         panel * kPanelColumns, 0, kept_[n], 0);
      }
      ptx::commit_stores();
    }
    __syncwarp();
  }
  /// Of this warp, in a tile.
  static __device__ int first_row() { return 16 * (threadIdx.x / 32 % 4); }

  Shared& shared_;
  const KvOuterArgs& args_;
  const CUtensorMap* const o_map_;
  const int warpgroup_;

  RingPosition<kTaskStages> at_;
  RingPosition<1> tile_at_;
  int part_[2], seen_[2];   ///< of this thread's two rows
  int kept_[2] = {-1, -1};  ///< part_ of what keep() left
  uint32_t q_[kDim / 16][4], p_[kBlock / 16][4];
  float s_[kBlock / 2], o_[kDim / 2];
};

template <int kGroup>
__global__ void __launch_bounds__(kTileThreads, 1)
    attend_blocks(const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map,
                  const __grid_constant__ CUtensorMap o_map,
                  const __grid_constant__ KvOuterArgs args) {
  auto& shared = *reinterpret_cast<KvOuterShared<kGroup>*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    constexpr int kWarps = 4;  // of a warpgroup
    shared.work_ring.init(kTileWarpgroups);
    shared.k_ring.init(kWarps * kTileWarpgroups);
    shared.v_ring.init(kWarps * kTileWarpgroups);
    for (auto& ring : shared.q_ring) ring.init(kWarps);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  if (!kv_outer_wanted(args.measured, args.workspace)) return;

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<kProducerRegisters>();
    if (warp < kTileWarpgroups)
      load_tiles<kGroup>(shared, args, &q_map, warp);
    else if (warp == kTileWarpgroups)
      load_blocks<kGroup>(shared, args, &k_map, &v_map);
  } else {
    ptx::take_registers<kTileRegisters>();
    TileConsumer<kGroup>(shared, args, &o_map, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::prefill
