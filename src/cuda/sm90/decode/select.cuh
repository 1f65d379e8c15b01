// The K best blocks of one (token, KV head), chosen by the consumers of one CTA, or of a cluster
// that shares the scores.
//
// A score and its block make one key, larger for higher scores and then for lower blocks. Keys are
// unique, so a key's rank is the number of larger ones, and every way of counting gives one result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/cluster.cuh"
#include "cuda/sm90/decode/config.h"
#include "cuda/sm90/decode/tiles.cuh"

namespace msa::cuda::sm90::decode {

using Key = uint64_t;  // 0 = none

constexpr uint32_t kForcedOrder = 0xffffffff;

__device__ inline Key make_key(float score, int block, bool forced) {
  const uint32_t bits = __float_as_uint(score + 0.F);  // -0 becomes +0
  const uint32_t order = bits ^ (bits >> 31 != 0 ? 0xffffffff : 0x80000000);
  return Key{forced ? kForcedOrder : order} << 32 | ~static_cast<uint32_t>(block);
}
__device__ inline int block_of(Key key) { return static_cast<int>(~static_cast<uint32_t>(key)); }
/// +inf if forced.
__device__ inline float score_of(Key key) {
  const auto order = static_cast<uint32_t>(key >> 32);
  if (order == kForcedOrder) return __uint_as_float(0x7f800000);
  return __uint_as_float(order ^ (order >> 31 != 0 ? 0x80000000 : 0xffffffff));
}

/// What a token chooses from. Blocks count from the first given one, `block0`.
struct Choice {
  int32_t blocks;      ///< that it sees
  int32_t block0;      ///< global id of block 0
  int32_t last_local;  ///< the last forced one: its own block, or where it sees all the last

  __device__ bool forced(int block, int init_blocks, int local_blocks) const {
    return block + block0 < init_blocks ||
           (block > last_local - local_blocks && block <= last_local);
  }
};

struct SelectScratch {
  static constexpr int kBest = kMaxChosen;
  union {
    struct {
      Key keys[kConsumers];
      Key survivors[kWarps * kBest];
    };
    Key gathered[kBest * kMaxBlocks / kConsumers];
  };
  Key best[kBest];
  Key others[16][kBest];  // the best of every CTA of the cluster
  int32_t count;          // of gathered

  /// best = the largest of one key per thread, descending; the first `threads` have one. Every warp
  /// drops what cannot be among them first.
  __device__ void rank(Key mine, int threads) {
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
    join_consumers();

    // Two threads per survivor, each against half of the others.
    if (warp < warps) {
      const int half = threadIdx.x % 2;
      const Key survivor = survivors[threadIdx.x / 2];
      int larger = 0;
#pragma unroll 8
      for (int i = half; i < warps * kBest; i += 2) larger += survivors[i] > survivor;
      larger += __shfl_xor_sync(0xffffffff, larger, 1);
      if (half == 0 && survivor != 0 && larger < kBest) best[larger] = survivor;
    }
    join_consumers();
  }

  /// best = the largest of key_of(scores[j], j), first <= j < last, 0 behind them; in any order if
  /// there are no more than `few`. `scores` and `first` are aligned to 16 bytes. All consumers.
  template <class KeyOf>
  __device__ void choose(const float* scores, int first, int last, int few, const KeyOf& key_of) {
    const int i = static_cast<int>(threadIdx.x);
    if (last - first <= few) {
      if (i < kBest) best[i] = first + i < last ? key_of(scores[first + i], first + i) : 0;
      join_consumers();
      return;
    }
    const auto for_each_key = [&](const auto& take) {
#pragma unroll 1
      for (int j = first + 4 * i; j < last; j += 4 * kConsumers) {
        const float4 four = *reinterpret_cast<const float4*>(scores + j);
        take(key_of(four.x, j));
        if (j + 1 < last) take(key_of(four.y, j + 1));
        if (j + 2 < last) take(key_of(four.z, j + 2));
        if (j + 3 < last) take(key_of(four.w, j + 3));
      }
    };
    // One key per thread, whose ranks are the answer, or else the best of a thread's several.
    const bool one_each = last - first <= kConsumers;
    Key mine = 0;
    if (!one_each)
      for_each_key([&](Key key) { mine = max(mine, key); });
    else if (first + i < last)
      mine = key_of(scores[first + i], first + i);
    rank(mine, one_each ? last - first : (last - first + 3) / 4);
    if (one_each) return;

    // All keys from the last of the threads' best on, few more than kBest, hold the best of all.
    const Key least = best[kBest - 1];
    for_each_key([&](Key key) {
      if (key >= least) gathered[atomicAdd(&count, 1)] = key;
    });
    join_consumers();
    for (int g = i; g < count; g += kConsumers) {
      int larger = 0;
#pragma unroll 4
      for (int e = 0; e < count; ++e) larger += gathered[e] > gathered[g];
      if (larger < kBest) best[larger] = gathered[g];
    }
    join_consumers();
  }

  /// winners[0..count-1] of every CTA = the largest keys of all CTAs' best; there must be so many.
  /// `met` and `known` are the same two barriers in each, fresh, expecting one arrival. All
  /// consumers of a cluster of `parts` > 1.
  __device__ void exchange(Key* winners, int count, int parts, ptx::Barrier* met,
                           ptx::Barrier* known) {
    static_assert(kConsumers == 16 * kBest, "a thread per key and CTA");
    const int i = threadIdx.x / 16, other = threadIdx.x % 16;
    const Key mine = best[i];
    if (threadIdx.x == 0) {
      ptx::arrive_expect(met, parts * kBest * sizeof(Key));
      ptx::arrive_expect(known, count * sizeof(Key));
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
};

/// ids[0..topk) = what choose() left, as global ids, ascending, -1 in the tail; scores may be null.
/// One warp, whose lanes hold `best`.
__device__ inline void write_list(const Choice& choice, Key best, int topk, int32_t* ids,
                                  float* scores) {
  const int lane = threadIdx.x % 32;
  const int chosen = min(choice.blocks, topk);
  int place = 0;
  for (int i = 0; i < chosen; ++i)
    place += __shfl_sync(0xffffffff, block_of(best), i) < block_of(best);
  if (lane >= chosen) place = lane;
  if (lane >= topk) return;
  ids[place] = lane < chosen ? choice.block0 + block_of(best) : -1;
  if (scores != nullptr)
    scores[place] = lane < chosen ? score_of(best) : __uint_as_float(0xff800000);
}

}  // namespace msa::cuda::sm90::decode
