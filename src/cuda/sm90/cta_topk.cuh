// The best blocks of one row, chosen by several warps of one CTA, or of a cluster that shares the
// scores. Keys are unique, so a key's rank is the number of larger ones, and every way of counting
// gives one result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/topk.cuh"

namespace msa::cuda::sm90 {

/// `kWarps` warps, which join at named barrier kBarrier, and up to kMostBlocks blocks.
template <int kWarps, int kMostBlocks, uint32_t kBarrier>
struct CtaTopK {
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kBest = 16;
  union {
    struct {
      BlockKey keys[kThreads];
      BlockKey survivors[kWarps * kBest];
    };
    BlockKey gathered[kBest * kMostBlocks / kThreads];
  };
  BlockKey best[kBest];
  BlockKey others[16][kBest];  // the best of every CTA of the cluster
  int32_t count;               // of gathered

  /// best = the largest of one key per thread, descending; the first `threads` have one. Every warp
  /// drops what cannot be among them first.
  __device__ void rank(BlockKey mine, int threads) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int warps = min((threads + 31) / 32, kWarps);
    if (threadIdx.x < kBest) best[threadIdx.x] = 0;
    if (threadIdx.x == 0) count = 0;
    keys[threadIdx.x] = mine;
    __syncwarp();
    if (warp < warps) {
      int larger = 0;
#pragma unroll 8
      for (int i = 0; i < 32; ++i) larger += keys[warp * 32 + i] > mine;
      const int kept = __popc(__ballot_sync(0xffffffff, mine != 0));
      if (mine != 0 && larger < kBest) survivors[warp * kBest + larger] = mine;
      if (lane >= kept && lane < kBest) survivors[warp * kBest + lane] = 0;
    }
    join();

    // Two threads per survivor, each against half of the others.
    if (warp < warps) {
      const int half = threadIdx.x % 2;
      const BlockKey survivor = survivors[threadIdx.x / 2];
      int larger = 0;
#pragma unroll 8
      for (int i = half; i < warps * kBest; i += 2) larger += survivors[i] > survivor;
      larger += __shfl_xor_sync(0xffffffff, larger, 1);
      if (half == 0 && survivor != 0 && larger < kBest) best[larger] = survivor;
    }
    join();
  }

  /// best = the largest of key_of(scores[j], j), first <= j < last, 0 behind them; in any order if
  /// there are no more than `few`. `scores` and `first` are aligned to 16 bytes. All threads.
  template <class KeyOf>
  __device__ void choose(const float* scores, int first, int last, int few, const KeyOf& key_of) {
    const int i = static_cast<int>(threadIdx.x);
    if (last - first <= few) {
      if (i < kBest) best[i] = first + i < last ? key_of(scores[first + i], first + i) : 0;
      join();
      return;
    }
    const auto for_each_key = [&](const auto& take) {
#pragma unroll 1
      for (int j = first + 4 * i; j < last; j += 4 * kThreads) {
        const float4 four = *reinterpret_cast<const float4*>(scores + j);
        take(key_of(four.x, j));
        if (j + 1 < last) take(key_of(four.y, j + 1));
        if (j + 2 < last) take(key_of(four.z, j + 2));
        if (j + 3 < last) take(key_of(four.w, j + 3));
      }
    };
    // One key per thread, whose ranks are the answer, or else the best of a thread's several.
    const bool one_each = last - first <= kThreads;
    BlockKey mine = 0;
    if (!one_each)
      for_each_key([&](BlockKey key) { mine = max(mine, key); });
    else if (first + i < last)
      mine = key_of(scores[first + i], first + i);
    rank(mine, one_each ? last - first : (last - first + 3) / 4);
    if (one_each) return;

    // All keys from the last of the threads' best on, few more than kBest, hold the best of all.
    const BlockKey least = best[kBest - 1];
    for_each_key([&](BlockKey key) {
      if (key >= least) gathered[atomicAdd(&count, 1)] = key;
    });
    join();
    for (int g = i; g < count; g += kThreads) {
      int larger = 0;
#pragma unroll 4
      for (int e = 0; e < count; ++e) larger += gathered[e] > gathered[g];
      if (larger < kBest) best[larger] = gathered[g];
    }
    join();
  }

  /// winners[0..count-1] of every CTA = the largest keys of all CTAs' best; there must be so many.
  /// `met` and `known` are the same two barriers in each, fresh, expecting one arrival. All
  /// threads of a cluster of `parts` > 1.
  __device__ void exchange(BlockKey* winners, int count, int parts, ptx::Barrier* met,
                           ptx::Barrier* known) {
    static_assert(kThreads == 16 * kBest, "a thread per key and CTA");
    const int i = threadIdx.x / 16, other = threadIdx.x % 16;
    const BlockKey mine = best[i];
    if (threadIdx.x == 0) {
      ptx::arrive_expect(met, parts * kBest * sizeof(BlockKey));
      ptx::arrive_expect(known, count * sizeof(BlockKey));
    }
    if (other < parts) ptx::store_to_cta(other, &others[ptx::cluster_rank()][i], mine, met);
    ptx::wait(met, 0);
    int larger = 0;
    for (int e = 0; e < kBest && other < parts; ++e)  // every lane of a half warp in its own bank
      larger += others[other][(e + other) % kBest] > mine;
    for (int step = 8; step > 0; step /= 2) larger += __shfl_xor_sync(0xffffffff, larger, step);
    if (mine != 0 && larger < count && other < parts)
      ptx::store_to_cta(other, &winners[larger], mine, known);
    ptx::wait(known, 0);
  }

 private:
  static __device__ void join() { ptx::join(kBarrier, kThreads); }
};

/// ids[0 .. topk-1] = block0 and the ids of `count` keys, a lane each, ascending, -1 behind them;
/// scores, unless null, theirs and -inf. One warp, topk <= 32.
__device__ inline void write_list(BlockKey own, int count, int topk, int block0, int32_t* ids,
                                  float* scores) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int place = 0;
  for (int i = 0; i < count; ++i) place += __shfl_sync(0xffffffff, id_of(own), i) < id_of(own);
  if (lane >= topk) return;
  if (lane >= count) place = lane;
  ids[place] = lane < count ? block0 + id_of(own) : -1;
  if (scores != nullptr) scores[place] = lane < count ? score_of(order_of(own)) : -INFINITY;
}

}  // namespace msa::cuda::sm90
