// Gradients of queries: 128 rows walk the union of their block lists as prefill/union.cuh does,
// with three products a block instead of two. Without lists they walk every block they see.
//
//   S = Q K^T;  dP = dO V^T;  P = exp2(S scale - lse);  dS = P (dP - delta);  dQ += dS K
//
// A persistent CTA takes tiles from a counter. Of its producers one warp plans the next tile and
// fetches its rows of Q and dO, one loads the blocks of this one; two warpgroups compute, 64 rows
// each. K is read twice, for S and for dQ, V only once: hence the ring of K is a block longer.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/backward/config.h"
#include "cuda/sm90/backward/query_gradient.h"
#include "cuda/sm90/walk/tile_queue.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::backward {

inline constexpr int kKSteps = 3;  ///< blocks of K on their way or in use, 32 KB each
inline constexpr int kVSteps = 2;  ///< of V

template <int kGroup>
struct QueryGradientShared {
  using Rows = SharedTile<kRows, kDim>;
  using Block = SharedTile<kBlock, kDim>;

  Rows q, d_o;
  Block k[kKSteps], v[kVSteps];
  walk::TileBlocks<kGroup> steps;
  walk::TileRows<kGroup> tile;
  walk::RingBlock step[kKSteps];
  RingBarriers<1> plan_ring, row_ring;  ///< steps and tile; q and d_o
  RingBarriers<kKSteps> k_ring;
  RingBarriers<kVSteps> v_ring;
};

/// One warp: tile after tile from the counter, and its rows.
template <int kGroup>
__device__ void plan_tiles(QueryGradientShared<kGroup>& shared, const Maps& maps,
                           const QueryGradientArgs& args) {
  const bool listed = args.lists.ids.data != nullptr;
  // Without lists the last tiles of a sequence are the longest.
  walk::TileQueue<kGroup> queue(args.batch, args.lists, args.heads_kv, &args.words->next_tile,
                                /*last_first=*/!listed);
  walk::TilePlanner<kGroup> planner;
  RingPosition<1> at;
  for (; queue.next(&planner); at.advance()) {
    at.wait_empty(shared.plan_ring);
    if (listed)
      planner.write(args.batch, &shared.tile, &shared.steps);
    else
      planner.write_all(&shared.tile, &shared.steps);
    ptx::arrive(&shared.plan_ring.full[0]);

    at.wait_empty(shared.row_ring);  // the tile before is done with its last S and dP
    ptx::Barrier* full = &shared.row_ring.full[0];
    planner.load_rows(shared.q, &maps.q, full);
    planner.load_rows(shared.d_o, &maps.d_o, full);
  }
  at.wait_empty(shared.plan_ring);
  if (threadIdx.x % 32 == 0) shared.tile.steps = shared.steps.count = -1;
  ptx::arrive(&shared.plan_ring.full[0]);
}

/// One thread: the blocks of the plans into the ring.
template <int kGroup>
__device__ void load_blocks(QueryGradientShared<kGroup>& shared, const Maps& maps,
                            const QueryGradientArgs& args) {
  const auto& steps = shared.steps;
  const bool listed = args.lists.ids.data != nullptr;
  RingPosition<1> plan_at;
  RingPosition<kKSteps> k_at;
  RingPosition<kVSteps> v_at;
  for (;; plan_at.advance()) {
    plan_at.wait_full(shared.plan_ring);
    if (steps.count < 0) return;
    for (int n = 0; n < steps.count; ++n, k_at.advance(), v_at.advance()) {
      const int source = listed ? steps.source[n] : steps.first_source + n * kBlock;
      k_at.wait_empty(shared.k_ring);
      shared.step[k_at.stage] = {.block = listed ? steps.block[n] : n,
                                 .who = listed ? steps.who[n] : -1};
      load_tile(shared.k[k_at.stage], &maps.k, &shared.k_ring.full[k_at.stage], source, steps.head,
                0);
      v_at.wait_empty(shared.v_ring);
      load_tile(shared.v[v_at.stage], &maps.v, &shared.v_ring.full[v_at.stage], source, steps.head,
                0);
    }
    ptx::arrive(&shared.plan_ring.empty[0]);
  }
}

/// A warpgroup: its 64 rows of every tile.
template <int kGroup, class Out>
class QueryConsumer {
 public:
  using Shared = QueryGradientShared<kGroup>;
  static constexpr int kQueries = kRows / kGroup;

  __device__ QueryConsumer(Shared& shared, const QueryGradientArgs& args, int warpgroup)
      : shared_(shared), args_(args), warpgroup_(warpgroup), huge_(args.words->huge != 0) {}

  __device__ void run() {
    for (RingPosition<1> tile_at;; tile_at.advance()) {
      tile_at.wait_full(shared_.plan_ring);
      const int steps = shared_.tile.steps;
      if (steps < 0) return;
      begin_tile();
      ptx::arrive(&shared_.plan_ring.empty[0]);

      passed_ = 0;
      tile_at.wait_full(shared_.row_ring);
      if (own_steps_ > 0) {
        walk();
      } else {
        release(&shared_.row_ring.empty[0]);
      }
      end_tile();
      while (passed_ < steps) pass_step();
    }
  }

 private:
  /// This thread's two rows of the tile.
  __device__ void begin_tile() {
    kv_head_ = shared_.tile.head;
    own_steps_ = shared_.tile.own_steps[warpgroup_];
    kv_len_ = shared_.tile.kv_len;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = row(h) / kGroup;
      token_[h] = shared_.tile.row[query];
      visible_[h] = shared_.tile.visible[query];
      const float* terms = args_.row_terms +
                           (int64_t{token_[h]} * args_.heads_kv + kv_head_) * (2 * kGroup) +
                           row(h) % kGroup;
      lse_[h] = token_[h] >= 0 ? terms[0] : INFINITY;
      delta_[h] = token_[h] >= 0 ? terms[kGroup] : 0;
    }
#pragma unroll
    for (float& x : dq_) x = 0;
  }
  /// In the tile.
  __device__ int row(int h) const {
    return 64 * warpgroup_ + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
  }

  /// dQ += dS K of one block, then S and dP of the next, one behind the other at the tensor cores.
  /// dP starts when dQ is done, so that its registers may be those that held dS; S runs meanwhile.
  __device__ void walk() {
    find_step();
    {
      float s[kBlock / 2], dp[kBlock / 2];
      start_scores(s);
      start_dp(dp);
      take_ds(s, dp);
    }
    for (int left = own_steps_ - 1; left > 0; --left) {
      float s[kBlock / 2], dp[kBlock / 2];
      const RingPosition<kKSteps> before = k_at_;
      start_dq(before);
      advance();
      find_step();
      start_scores(s);
      ptx::wgmma_wait<1>();
      end_dq(before);
      start_dp(dp);
      take_ds(s, dp);
    }
    release(&shared_.row_ring.empty[0]);
    start_dq(k_at_);
    ptx::wgmma_wait<0>();
    end_dq(k_at_);
    advance();
  }

  /// On to the next block that a query of this warpgroup chose.
  __device__ void find_step() {
    constexpr int kOwn = (1 << kQueries / kWarpgroups) - 1;
    while (true) {
      k_at_.wait_full(shared_.k_ring);
      step_ = read_for_warp(shared_.step[k_at_.stage]);
      if (step_.who >> (warpgroup_ * kQueries / kWarpgroups) & kOwn) break;
      pass_step();
    }
    if (const int end = kv_len_ - step_.block * kBlock; end < kBlock)
      clear_rows(shared_.k[k_at_.stage], end, 1 + warpgroup_);
  }
  /// Releases a block without having read it.
  __device__ void pass_step() {
    k_at_.wait_full(shared_.k_ring);
    release(&shared_.k_ring.empty[k_at_.stage]);
    v_at_.wait_full(shared_.v_ring);
    release(&shared_.v_ring.empty[v_at_.stage]);
    advance();
  }
  __device__ void advance() { ++passed_, k_at_.advance(), v_at_.advance(); }

  __device__ void start_scores(float (&s)[kBlock / 2]) {
    ptx::wgmma_fence();
    score_keys(s, shared_.q, 64 * warpgroup_, shared_.k[k_at_.stage]);
    ptx::wgmma_commit();
  }
  __device__ void start_dp(float (&dp)[kBlock / 2]) {
    v_at_.wait_full(shared_.v_ring);
    ptx::wgmma_fence();
    score_keys(dp, shared_.d_o, 64 * warpgroup_, shared_.v[v_at_.stage]);
    ptx::wgmma_commit();
  }
  __device__ void start_dq(const RingPosition<kKSteps>& at) {
    ptx::wgmma_fence();
    add_values(dq_, ds_, shared_.k[at.stage]);
    ptx::wgmma_commit();
  }
  __device__ void end_dq(const RingPosition<kKSteps>& at) {
    ptx::pin(dq_);
    release(&shared_.k_ring.empty[at.stage]);
  }

  /// S, later dP, are there: dS as an operand. A warp without a row that reads the block has no
  /// exponentials; a branch around the rest would cost registers that are not there.
  __device__ void take_ds(float (&s)[kBlock / 2], float (&dp)[kBlock / 2]) {
    ptx::wgmma_wait<1>();
    ptx::pin(s);
    // A row whose LSE is -inf (here +inf) adds nothing, whatever its dO is.
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool reads = step_.who >> row(h) / kGroup & 1 && lse_[h] != INFINITY;
      limit[h] = reads ? visible_[h] - step_.block * kBlock : 0;
    }
    const bool attends = __any_sync(0xffffffff, limit[0] > 0 || limit[1] > 0);
    if (attends) {
      const float scale = args_.scale * kLog2E;
#pragma unroll
      for (int i = 0; i < kBlock / 2; ++i) s[i] = fmaf(s[i], scale, -lse_[i / 2 % 2]);
      if (huge_) {
#pragma unroll
        for (float& x : s) x = x > 0 ? 0 : x;
      }
#pragma unroll
      for (float& x : s) x = ptx::exp2_fast(x);
    }
    ptx::wgmma_wait<0>();
    ptx::pin(dp);
    release(&shared_.v_ring.empty[v_at_.stage]);
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) s[i] *= dp[i] - delta_[i / 2 % 2];
    // What is hidden may be anything, NaN as well: selected, not multiplied.
    if (__any_sync(0xffffffff, limit[0] < kBlock || limit[1] < kBlock)) mask_columns(s, limit, 0);
    pack_operand(s, ds_);
  }

  __device__ void end_tile() {
    const float scale[2] = {args_.scale, args_.scale};
    scale_rows(dq_, scale);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int head = kv_head_ * kGroup + row(h) % kGroup;
      Out* to = args_.dq.template at<Out>(token_[h], head);
      store_row(dq_, h, token_[h] >= 0 ? to : nullptr);
    }
  }

  Shared& shared_;
  const QueryGradientArgs& args_;
  const int warpgroup_;
  const bool huge_;  ///< Words::huge

  RingPosition<kKSteps> k_at_;
  RingPosition<kVSteps> v_at_;
  int passed_ = 0;  ///< steps of the tile behind k_at_
  walk::RingBlock step_{};

  int kv_head_ = 0, own_steps_ = 0, kv_len_ = 0;
  int token_[2], visible_[2];  ///< of this thread's two rows
  float lse_[2], delta_[2];    ///< likewise; lse * log2(e)
  float dq_[kDim / 2];
  uint32_t ds_[kBlock / 16][4];
};

template <int kGroup, class Out>
__global__ void __launch_bounds__(kThreads, 1)
    query_gradient(const __grid_constant__ Maps maps,
                   const __grid_constant__ QueryGradientArgs args) {
  auto& shared = *reinterpret_cast<QueryGradientShared<kGroup>*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    constexpr int kReaders = 4 * kWarpgroups;      // warps
    shared.plan_ring.init(32 * kReaders + 1, 32);  // and the loader
    shared.row_ring.init(kReaders, 2 * 32);        // q and d_o
    shared.k_ring.init(kReaders);
    shared.v_ring.init(kReaders);
    ptx::fence_barrier_init();
  }
  __syncthreads();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<walk::kProducerRegisters>();
    if (warp == 0) plan_tiles<kGroup>(shared, maps, args);
    if (warp == 1 && ptx::elect_one()) load_blocks<kGroup>(shared, maps, args);
  } else {
    ptx::take_registers<walk::kConsumerRegisters>();
    QueryConsumer<kGroup, Out>(shared, args, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::backward
