// The KL of the index branch by blocks of keys: a block and its index keys stay while the queries
// that read it come by. Teacher and student meet in registers, on transposed tiles (keys down,
// queries across), so that dS^T is an operand as it stands:
//
//   S^T = K Q^T        [128 keys, 16 queries * G heads]     P^T = mean over G of exp2(c S^T - lse)
//   Z^T = K' Q'^T      [128, 16]                            Pi^T = exp2(c' Z^T - lse')
//   dS^T = f (Pi^T - P^T)                                   dK' += dS^T Q'       [128, Di]
//   dQ'^T = K'^T dS^T  [Di, 16], a partial result of each entry, as sum P (log2 P - log2 Pi) is
//
// A persistent CTA takes tasks. One warp loads blocks and q by TMA, three gather the rest of the
// steps, two warpgroups compute: each has 64 of the keys, and of dQ' 64 of the dims, for which it
// reads the other's dS one step later.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/kl/kl_load.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::kl {

/// sums[2*n + h] of this lane's columns, 8 queries n -> sums over the quad, of queries 2*(l%4) + e:
/// out[2*h + e], as the student's accumulators lie.
__device__ inline void reduce_quad(const float (&sums)[16], float* out) {
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float four[4];
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float low_half = sums[2 * n + h], high_half = sums[2 * (n + 4) + h];
      four[n] = (high ? high_half : low_half) +
                __shfl_xor_sync(0xffffffff, high ? low_half : high_half, 2);
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      out[2 * h + e] = (odd ? four[e + 2] : four[e]) +
                       __shfl_xor_sync(0xffffffff, odd ? four[e] : four[e + 2], 1);
    }
  }
}

/// A warpgroup: its 64 keys of every task.
template <int kGroup, bool kGradients>
class KlConsumer {
 public:
  using Shared = KlShared<kGroup>;

  __device__ KlConsumer(Shared& shared, const KlArgs& args, int warpgroup)
      : shared_(shared),
        args_(args),
        warpgroup_(warpgroup),
        first_key_(64 * warpgroup + 16 * (static_cast<int>(threadIdx.x) / 32 % 4)),
        factor_(args.unit / static_cast<float>(max(*args.queries, 1))) {}

  __device__ void run() {
    for (;; block_at_.advance()) {
      block_at_.wait_full(shared_.block_ring);
      const Task& task = shared_.task[block_at_.stage];
      const int count = task.count, keys = task.keys, part = task.part;
      if (count == 0) return;
      take_keys();
      if (kGradients && keys < kBlock)
        clear_rows(shared_.k_idx[block_at_.stage], keys, 1 + warpgroup_);
#pragma unroll
      for (int& entry : part_) entry = -1;
      kl_part_ = -1;
      bool first = true;
      for (int left = count; left > 0; left -= kStepQueries, first = false) step(first);
      finish(part);
      ptx::arrive(&shared_.block_ring.empty[block_at_.stage]);
    }
  }

 private:
  static constexpr int kQueries = kTileRows / kGroup;     ///< of a tile
  static constexpr int kTiles = kStepQueries / kQueries;  ///< of a step

  static __device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  /// This warp's 16 keys as operands.
  __device__ void take_keys() {
    k_at_.wait_full(shared_.k_ring);
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::load_matrices(k_[i], shared_.k.at(first_key_ + lane() % 16, 16 * i + lane() / 16 * 8));
    release(&shared_.k_ring.empty[k_at_.stage]);
    k_at_.advance();
  }
  /// 16 queries against the block.
  __device__ void step(bool first) {
    float even[kTileRows / 2], odd[kTileRows / 2];  // S^T of tiles by turns
    float sums[16], p[8], z[8], dq[8];
    start_scores(even);
    step_at_.wait_full(shared_.step_ring);
    const auto& step = shared_.step[step_at_.stage];
    wait_exchange();
    ptx::wgmma_fence();
    start_student(z, step);
    if (kGradients) start_query_gradient(dq);
    ptx::wgmma_commit();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      auto& s = tile % 2 == 0 ? even : odd;
      if (tile + 1 < kTiles) start_scores(tile % 2 == 0 ? odd : even);
      // Where no tile was started, this returns at once: a border that ptxas respects, else it
      // would wait for the product ahead of the exponentials that are to run meanwhile.
      if (tile + 1 == kTiles) done_at_.wait_full(shared_.q_ring);
      if (tile == 0)
        ptx::wgmma_wait<2>();
      else if (tile + 1 < kTiles)
        ptx::wgmma_wait<1>();
      else
        ptx::wgmma_wait<0>();
      ptx::pin(s);
      release(&shared_.q_ring.empty[done_at_.stage]);
      done_at_.advance();
      if (tile == 1) {
        ptx::pin(z);
        if (kGradients) {
          ptx::pin(dq);
          store_query_gradient(dq);
        }
        store_divergence();
      }
      teach(s, &step.teacher[tile * kTileRows], tile * kQueries % 8, sums);
      ptx::pin(sums);  // not behind the next wait
      if ((tile + 1) * kQueries % 8 == 0) reduce_quad(sums, &p[tile * kQueries / 8 * 4]);
    }
    learn(z, p, step, first);
  }

  __device__ void start_scores(float (&s)[kTileRows / 2]) {
    q_at_.wait_full(shared_.q_ring);
    ptx::wgmma_fence();
    score_keys(s, k_, shared_.q[q_at_.stage]);
    ptx::wgmma_commit();
    q_at_.advance();
  }
  /// Z^T of this warpgroup's keys.
  __device__ void start_student(float (&z)[8], const typename Shared::Step& step) {
    const auto& k_idx = shared_.k_idx[block_at_.stage];
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i)
      ptx::wgmma(z, k_idx.k_major(64 * warpgroup_, i), step.q_idx.k_major(0, i), i > 0);
  }
  /// dQ'^T of the step before: this warpgroup's dims. Behind a task's beginning there was none:
  /// then it is a product of anything, which nobody stores.
  __device__ void start_query_gradient(float (&dq)[8]) {
    const auto& k_idx = shared_.k_idx[block_at_.stage];
    const auto& ds = shared_.exchange[(steps_ + 1) % 2].ds;
#pragma unroll
    for (int i = 0; i < kBlock / 16; ++i)
      ptx::wgmma<ptx::BLayout::kKMajor, ptx::ALayout::kMMajor>(dq, k_idx.n_major(i, warpgroup_),
                                                               ds.k_major(0, i), i > 0);
  }
  /// Until both warpgroups have written what they know of the step before. Then both have read the
  /// one before that, whose place the next one takes.
  __device__ void wait_exchange() {
    ptx::wait(&shared_.exchanged[(steps_ + 1) % 2], (steps_ - 1) >> 1 & 1);
  }

  /// Adds the probabilities of a tile, queries first .. of 8, over this lane's columns. Each is cut
  /// at 1 (tile/huge_lse.cuh): a minimum more costs nothing beside the exponentials.
  __device__ void teach(const float (&s)[kTileRows / 2], const float* shifts, int first,
                        float (&sums)[16]) const {
    constexpr int kPairs = kGroup / 8;  // of neighbouring columns that belong to a query
    constexpr float kMost = kGroup == 16 ? -4 : -3;  // log2(1 / G)
    const auto share = [&](float score, float shift) {
      return ptx::exp2_fast(ptx::min_nan(fmaf(score, args_.scale, shift), kMost));
    };
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const float2 shift = *reinterpret_cast<const float2*>(&shifts[8 * j + 2 * (lane() % 4)]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float p = share(s[4 * j + 2 * h], shift.x) + share(s[4 * j + 2 * h + 1], shift.y);
        float& sum = sums[2 * (first + j / kPairs) + h];
        sum = j % kPairs == 0 ? p : sum + p;
      }
    }
  }

  /// dS^T of the step into registers and dK', and to the other warpgroup. p and z: [4*j + 2*h + e]
  /// is key l/4 + 8*h of this warp, query 8*j + 2*(l%4) + e.
  __device__ void learn(const float (&z)[8], const float (&p)[8], const typename Shared::Step& step,
                        bool first) {
    auto& exchange = shared_.exchange[steps_ % 2];
    const int key = first_key_ + lane() / 4;
    float ds[8], kl[4];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int n = 8 * j + 2 * (lane() % 4) + e;
        const int seen = step.seen[n];
        const float shift = step.student[n];
        part_[2 * j + e] = step.part[n];
        kl[2 * j + e] = 0;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int i = 4 * j + 2 * h + e;
          const bool sees = key + 8 * h < seen;  // else both may be anything
          const float log_student = ptx::min_nan(fmaf(z[i], args_.index_scale, shift), 0);
          ds[i] = sees ? (ptx::exp2_fast(log_student) - p[i]) * factor_ : 0;
          if (args_.kl_parts != nullptr && sees && p[i] > 0)
            kl[2 * j + e] += p[i] * (log2f(p[i]) - log_student);
        }
      }
    }
    uint32_t operand[4];
    if (kGradients) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // 2 * j + h
        const __nv_bfloat162 pair = __floats2bfloat162_rn(ds[2 * i], ds[2 * i + 1]);
        operand[i] = reinterpret_cast<const uint32_t&>(pair);
        const int n = i / 2 * 8 + 2 * (lane() % 4), column = key + i % 2 * 8;
        *exchange.ds.at(n, column) = pair.x;
        *exchange.ds.at(n + 1, column) = pair.y;
      }
      ptx::fence_async_proxy();
      ptx::wgmma_fence();
      ptx::wgmma<ptx::BLayout::kNMajor>(dk_, operand, step.q_idx.n_major(0), !first);
      ptx::wgmma_commit();
    }
    if (args_.kl_parts != nullptr) {
      kl_part_ = step.part[lane() % kStepQueries];
      exchange_divergence(exchange, kl);
    }
    ptx::arrive(&shared_.exchanged[steps_ % 2]);
    ++steps_;
    if (kGradients) {
      ptx::wgmma_wait<0>();
      ptx::pin(dk_);
    }
    ptx::arrive(&shared_.step_ring.empty[step_at_.stage]);
    step_at_.advance();
  }
  /// Sums over this warp's keys of query 8*j + 2*(l%4) + e, kl[2*j + e].
  __device__ void exchange_divergence(typename Shared::Exchange& exchange, const float (&kl)[4]) {
    const bool j = lane() & 16, e = lane() & 8;
    float two[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      two[i] = (j ? kl[2 + i] : kl[i]) + __shfl_xor_sync(0xffffffff, j ? kl[i] : kl[2 + i], 16);
    float sum = (e ? two[1] : two[0]) + __shfl_xor_sync(0xffffffff, e ? two[0] : two[1], 8);
    sum += __shfl_xor_sync(0xffffffff, sum, 4);
    if ((lane() & 4) == 0)
      exchange.kl[first_key_ / 16][(j ? 8 : 0) + 2 * (lane() % 4) + (e ? 1 : 0)] = sum;
  }

  /// What the step before left, once exchanged: partial results of its entries.
  __device__ void store_query_gradient(const float (&dq)[8]) {
    const int dim = first_key_ + lane() / 4;  // keys and dims are shared out alike
#pragma unroll
    for (int n = 0; n < 4; ++n) {  // 2 * j + e
      if (part_[n] < 0) continue;
      float* to = args_.dq_parts + int64_t{part_[n]} * kDim + dim;
      to[0] = dq[4 * (n / 2) + n % 2];
      to[8] = dq[4 * (n / 2) + 2 + n % 2];
    }
  }
  __device__ void store_divergence() {
    if (first_key_ > 0 || lane() >= kStepQueries || kl_part_ < 0) return;
    const auto& exchange = shared_.exchange[(steps_ + 1) % 2];
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < 4 * kWarpgroups; ++warp) sum += exchange.kl[warp][lane()];
    args_.kl_parts[kl_part_] = sum;
  }

  /// What the last step left, and dK' of the task.
  __device__ void finish(int part) {
    wait_exchange();
    store_divergence();
    if (!kGradients) return;
    float dq[8];
    ptx::wgmma_fence();
    start_query_gradient(dq);
    ptx::wgmma_commit();
    float* to = args_.dk_parts + (int64_t{part} * kBlock + first_key_ + lane() / 4) * kDim;
    store_row(dk_, 0, to);
    store_row(dk_, 1, to + 8 * kDim);
    ptx::wgmma_wait<0>();
    ptx::pin(dq);
    store_query_gradient(dq);
  }

  Shared& shared_;
  const KlArgs& args_;
  const int warpgroup_;
  const int first_key_;  ///< of this warp, in the block
  const float factor_;   ///< f

  RingPosition<1> k_at_;
  RingPosition<kBlockStages> block_at_;
  RingPosition<kTileStages> q_at_, done_at_;
  RingPosition<kStepStages> step_at_;
  int steps_ = 0;     ///< of all tasks
  int part_[4];       ///< of the last step, for queries 8*j + 2*(l%4) + e; -1: none
  int kl_part_ = -1;  ///< likewise, for query l % 16
  uint32_t k_[kDim / 16][4];
  float dk_[kDim / 2];
};

template <int kGroup, bool kGradients>
__global__ void __launch_bounds__(kThreads, 1)
    kl_blocks(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
              const __grid_constant__ CUtensorMap k_idx_map, const __grid_constant__ KlArgs args) {
  auto& shared = *reinterpret_cast<KlShared<kGroup>*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    constexpr int kConsumers = 128 * kWarpgroups;
    shared.k_ring.init(kConsumers / 32);
    shared.q_ring.init(kConsumers / 32);
    shared.block_ring.init(kConsumers + 32 * kGatherWarps);
    shared.step_ring.init(kConsumers, 32);
    for (ptx::Barrier& barrier : shared.exchanged) ptx::init_barrier(&barrier, kConsumers);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::wait_for_previous_grid();

  const int warp = __shfl_sync(0xffffffff, threadIdx.x / 32, 0);
  if (warp < 4) {
    ptx::give_registers<kProducerRegisters>();
    if (warp == 0)
      load_tasks<kGroup>(shared, args, &q_map, &k_map, &k_idx_map);
    else
      Gatherer<kGroup>(shared, args, warp - 1).run();
  } else {
    ptx::take_registers<kConsumerRegisters>();
    KlConsumer<kGroup, kGradients>(shared, args, warp / 4 - 1).run();
  }
}

}  // namespace msa::cuda::sm90::kl
