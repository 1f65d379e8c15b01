// Sparse attention by tiles of queries: 128 rows walk the union of their block lists, and rows that
// did not choose a block sit it out. No partial results, each block read once per tile.
//
// A persistent CTA takes tiles from a counter. Of its producers one warp plans the next tile (and
// fetches its queries), one loads the blocks of this one into a ring of K and V; two warpgroups
// compute, 64 rows each.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/operands.cuh"
#include "cuda/sm90/prefill/single_row.cuh"
#include "cuda/sm90/prefill/windows.h"
#include "cuda/sm90/walk/tile_queue.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::prefill {

struct UnionArgs {
  DeviceBatch batch;
  Lists lists;
  Operands operands;
  Output out;
  float scale;   ///< softmax_scale * log2(e)
  int heads_kv;  ///< Hkv
  Header* header;
  bool measured;  ///< only if Header::overlap asks for the union
};

template <int kGroup>
struct UnionShared {
  using KvTile = SharedTile<kBlock, kDim>;

  SharedTile<kRows, kDim> q;
  KvTile k[kRingSteps], v[kRingSteps];
  walk::TileBlocks<kGroup> steps;
  walk::TileRows<kGroup> tile;
  walk::RingBlock step[kRingSteps];
  RingBarriers<1> plan_ring, q_ring;
  RingBarriers<kRingSteps> k_ring, v_ring;
};

/// One warp: tile after tile from the counter, its queries, its blocks.
template <int kGroup>
__device__ void plan_tiles(UnionShared<kGroup>& shared, const UnionArgs& args,
                           const CUtensorMap* q_map) {
  walk::TileQueue<kGroup> queue(args.batch, args.lists, args.heads_kv, &args.header->next_tile);
  walk::TilePlanner<kGroup> planner;
  RingPosition<1> at;
  for (; queue.next(&planner); at.advance()) {
    at.wait_empty(shared.plan_ring);
    at.wait_empty(shared.q_ring);
    planner.write(args.batch, &shared.tile, &shared.steps);
    ptx::arrive(&shared.plan_ring.full[0]);
    planner.load_rows(shared.q, q_map, &shared.q_ring.full[0]);
  }
  at.wait_empty(shared.plan_ring);
  at.wait_empty(shared.q_ring);
  if (threadIdx.x % 32 == 0) shared.tile.steps = shared.steps.count = -1;
  ptx::arrive(&shared.plan_ring.full[0]);
  ptx::arrive(&shared.q_ring.full[0]);
}

/// One thread: the blocks of the plans into the ring.
template <int kGroup>
__device__ void load_blocks(UnionShared<kGroup>& shared, const UnionArgs& args,
                            const CUtensorMap* k_map, const CUtensorMap* v_map) {
  const bool paged = args.batch.page_table != nullptr;
  const auto load = [&](auto& tile, const CUtensorMap* map, ptx::Barrier* full, int source) {
    load_tile(tile, map, full, paged ? 0 : source, shared.steps.head, paged ? source : 0);
  };
  RingPosition<1> plan_at;
  RingPosition<kRingSteps> at;
  while (true) {
    plan_at.wait_full(shared.plan_ring);
    const int steps = shared.steps.count;
    if (steps < 0) return;
    for (int n = 0; n < steps; ++n, at.advance()) {
      const int source = shared.steps.source[n];
      at.wait_empty(shared.k_ring);
      shared.step[at.stage] = {shared.steps.block[n], shared.steps.who[n]};
      load(shared.k[at.stage], k_map, &shared.k_ring.full[at.stage], source);
      at.wait_empty(shared.v_ring);
      load(shared.v[at.stage], v_map, &shared.v_ring.full[at.stage], source);
    }
    ptx::arrive(&shared.plan_ring.empty[0]);
    plan_at.advance();
  }
}

/// A warpgroup: its 64 rows of every tile.
template <int kGroup, class Out>
class Consumer {
 public:
  using Shared = UnionShared<kGroup>;
  static constexpr int kQueries = kRows / kGroup;

  __device__ Consumer(Shared& shared, const UnionArgs& args, int warpgroup)
      : shared_(shared), args_(args), warpgroup_(warpgroup) {}

  __device__ void run() {
    for (RingPosition<1> tile_at;; tile_at.advance()) {
      tile_at.wait_full(shared_.q_ring);
      const int steps = shared_.tile.steps;
      if (steps < 0) return;
      begin_tile();
      ptx::arrive(&shared_.q_ring.empty[0]);

      passed_ = 0;
      if (own_steps_ > 0) attend();
      end_tile();
      while (passed_ < steps) pass_step();
    }
  }

 private:
  /// This thread's two rows of the tile, and the queries as operands.
  __device__ void begin_tile() {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int first = 64 * warpgroup_ + 16 * warp;  // row of the tile
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::load_matrices(q_[i], shared_.q.at(first + lane % 16, 16 * i + lane / 16 * 8));
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + lane / 4 + 8 * h;
      query_[h] = row / kGroup;
      token_[h] = shared_.tile.row[query_[h]];
      visible_[h] = shared_.tile.visible[query_[h]];
      head_[h] = shared_.tile.head * kGroup + row % kGroup;
    }
    own_steps_ = shared_.tile.own_steps[warpgroup_];
    kv_len_ = shared_.tile.kv_len;
    softmax_ = {};
#pragma unroll
    for (float& x : o_) x = 0;
  }

  /// S = Q K^T of one block while O += P V of the one before still runs.
  __device__ void attend() {
    float factor[2];
    find_step();
    start_scores();
    ptx::wgmma_wait<0>();
    take_scores(factor);
    pack();
    for (int left = own_steps_ - 1; left > 0; --left) {
      const RingPosition<kRingSteps> before = at_;
      const int before_block = step_.block;
      ++passed_, at_.advance();
      find_step();
      start_scores();
      start_values(before, before_block);
      ptx::wgmma_wait<1>();
      take_scores(factor);
      end_values(before);
      if (attends_) scale_rows(o_, factor);
      pack();
    }
    start_values(at_, step_.block);
    end_values(at_);
    ++passed_, at_.advance();
  }

  /// On to the next block that a query of this warpgroup chose.
  __device__ void find_step() {
    constexpr int kOwn = (1 << kQueries / kWarpgroups) - 1;
    while (true) {
      at_.wait_full(shared_.k_ring);
      step_ = read_for_warp(shared_.step[at_.stage]);
      if (step_.who >> (warpgroup_ * kQueries / kWarpgroups) & kOwn) return;
      pass_step();
    }
  }
  /// Releases a block without having read it.
  __device__ void pass_step() {
    at_.wait_full(shared_.k_ring);
    release(&shared_.k_ring.empty[at_.stage]);
    at_.wait_full(shared_.v_ring);
    release(&shared_.v_ring.empty[at_.stage]);
    ++passed_, at_.advance();
  }

  __device__ void start_scores() {
    ptx::wgmma_fence();
    score_keys(s_, q_, shared_.k[at_.stage]);
    ptx::wgmma_commit();
  }
  /// The scores are there: online softmax.
  __device__ void take_scores(float (&factor)[2]) {
    ptx::pin(s_);
    release(&shared_.k_ring.empty[at_.stage]);
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      limit[h] = step_.who >> query_[h] & 1 ? visible_[h] - step_.block * kBlock : 0;
    attends_ = __any_sync(0xffffffff, limit[0] > 0 || limit[1] > 0);
    if (!attends_) return;
    if (__any_sync(0xffffffff, limit[0] < kBlock || limit[1] < kBlock)) mask_columns(s_, limit);
    float block_max[2];
    row_max(s_, block_max);
    softmax_.absorb<false>(s_, block_max, args_.scale, factor);
  }
  /// The rows' probabilities; zeros where the warp sat the block out.
  __device__ void pack() {
    if (attends_) {
      pack_operand(s_, p_);
    } else {
#pragma unroll
      for (auto& step : p_)
        for (uint32_t& pair : step) pair = 0;
    }
  }

  __device__ void start_values(const RingPosition<kRingSteps>& at, int block) {
    at.wait_full(shared_.v_ring);
    auto& v = shared_.v[at.stage];
    if (const int end = kv_len_ - block * kBlock; end < kBlock) clear_rows(v, end, 1 + warpgroup_);
    ptx::wgmma_fence();
    add_values(o_, p_, v);
    ptx::wgmma_commit();
  }
  __device__ void end_values(const RingPosition<kRingSteps>& at) {
    ptx::wgmma_wait<0>();
    ptx::pin(o_);
    release(&shared_.v_ring.empty[at.stage]);
  }

  __device__ void end_tile() {
    float inverse[2], lse[2];
    softmax_.finish(args_.scale, inverse, lse);
    scale_rows(o_, inverse);
    const Output& out = args_.out;
    // A value that is no finite number has reached all 64 rows of the warpgroup.
    float zero = 0;
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i)
      if (i / 2 % 2 == 0) zero = fmaf(o_[i], 0.F, zero);
    const bool spoiled = __any_sync(0xffffffff, zero != 0);
    bool again[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool exists = token_[h] >= 0;
      Out* row = out.o.template at<Out>(token_[h], head_[h]);
      store_row(o_, h, exists ? row : nullptr);
      if (exists && out.lse.data != nullptr && threadIdx.x % 4 == 0)
        *out.lse.at(token_[h], head_[h]) = lse[h];
      again[h] = exists && ((spoiled && !isnan(lse[h])) || is_huge_exponent(softmax_.max[h]));
    }
    if (__any_sync(0xffffffff, again[0] || again[1])) attend_rows_again(again);
  }
  /// Rows that a value may have reached which another row of the tile attends, and rows with huge
  /// logits.
  __device__ void attend_rows_again(const bool (&again)[2]) {
    __syncwarp();  // what the row's lanes have stored is stored over
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t lanes = __ballot_sync(0xffffffff, again[h]);
#pragma unroll 1
      for (int lane = 0; lane < 32; lane += 4) {
        if ((lanes >> lane & 0xf) == 0) continue;
        const int head = __shfl_sync(0xffffffff, head_[h], lane);
        const int token = __shfl_sync(0xffffffff, token_[h], lane);
        attend_row<Out>(args_.batch, args_.lists, args_.operands, args_.out, args_.scale,
                        head / kGroup, head, token);
      }
    }
  }

  Shared& shared_;
  const UnionArgs& args_;
  const int warpgroup_;

  RingPosition<kRingSteps> at_;
  int passed_ = 0;  ///< steps of the tile behind at_
  walk::RingBlock step_{};
  bool attends_ = false;  ///< a row of this warp chose the block

  int own_steps_ = 0, kv_len_ = 0;
  int query_[2], token_[2], visible_[2], head_[2];  ///< of this thread's two rows
  OnlineSoftmax softmax_;
  uint32_t q_[kDim / 16][4], p_[kBlock / 16][4];
  float s_[kBlock / 2], o_[kDim / 2];
};

template <int kGroup, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    attend_union(const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap v_map,
                 const __grid_constant__ UnionArgs args) {
  auto& shared = *reinterpret_cast<UnionShared<kGroup>*>(ptx::dynamic_shared);
  if (args.measured && prefers_kv_outer(args.header->overlap)) return;
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kWarpgroups;  // warps
    shared.plan_ring.init(1, 32);
    shared.q_ring.init(32 * kReaders, 32);
    shared.k_ring.init(kReaders);
    shared.v_ring.init(kReaders);
    ptx::fence_barrier_init();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<kProducerRegisters>();
    if (warp == 0) plan_tiles<kGroup>(shared, args, &q_map);
    if (warp == 1 && ptx::elect_one()) load_blocks<kGroup>(shared, args, &k_map, &v_map);
  } else {
    ptx::take_registers<kConsumerRegisters>();
    Consumer<kGroup, Out>(shared, args, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::prefill
