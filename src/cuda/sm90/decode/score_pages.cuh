// Block scores of the new tokens of a batch: one pass over the index keys at the speed of memory.
//
// The blocks of all sequences form one row, cut into equal shares, one per CTA, so that ragged
// batches load every SM alike. A producer warp streams the share through a ring; eight warps take
// 16 keys each of a block, and every kWarps blocks they put their maxima together.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/decode/tiles.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"

namespace msa::cuda::sm90::decode {

inline constexpr int kScoreStages = 3;  // of 32 KB: leaves room for the attention kernel to start

struct ScoreArguments {
  CUtensorMap q;  ///< q_idx [T,Hi,Di], boxes of all heads of `group_tokens` tokens
  CUtensorMap k;  ///< pages [P,Bk,Di], boxes of one page
  DeviceBatch batch;
  int32_t heads;         ///< Hi
  int32_t group_tokens;  ///< grid.y counts groups of a sequence's tokens, 16 / Hi each
  float* scores;         ///< [T,Hi,columns]
  int64_t columns;

  /// Of row `row` of a group, x / heads for x < 16.
  __device__ int token_of(int row) const { return row * (65536 / heads + 1) >> 16; }
};

struct ScoreShared {
  KeyTile ring[kScoreStages];
  RowTile q;                               // a row per (token, head)
  float maxima[2][kWarps][kRows][kWarps];  // [side, block, row, warp]
  int32_t ends[kMaxSequences];             // blocks of sequences 0..b
  ptx::Barrier q_full;
  RingBarriers<kScoreStages> barriers;
};

/// ends[b] = blocks of sequences 0..b, of those that have a token `first_token`. All threads.
__device__ inline void sum_blocks(ScoreShared& shared, const DeviceBatch& batch, int first_token,
                                  int64_t columns) {
  for (int b = threadIdx.x; b < batch.sequences; b += kThreads) {
    const DeviceSequence s = batch.sequence(b);
    shared.ends[b] =
        s.q_len > first_token ? static_cast<int>(min(int64_t{s.blocks(kBlock)}, columns)) : 0;
  }
  __syncthreads();
  if (batch.sequences == 1) return;
  if (threadIdx.x < 32) {
    int before = 0;
    for (int first = 0; first < batch.sequences; first += 32) {
      const int lane = threadIdx.x, b = first + lane;
      int sum = b < batch.sequences ? shared.ends[b] : 0;
      for (int i = 1; i < 32; i *= 2) {
        const int left = __shfl_up_sync(0xffffffff, sum, i);
        if (lane >= i) sum += left;
      }
      sum += before;
      if (b < batch.sequences) shared.ends[b] = sum;
      before = __shfl_sync(0xffffffff, sum, 31);
    }
  }
  __syncthreads();
}

/// Where the blocks of one sequence lie in the row of all blocks.
struct Place {
  int b = -1;
  int begin = 0, end = 0;

  __device__ bool has(int n) const { return begin <= n && n < end; }
};

__device__ inline Place place_of(const int32_t* ends, int sequences, int n) {
  int low = 0, high = sequences - 1;  // the answer lies in [low, high]
  while (low < high) {
    const int middle = (low + high) / 2;
    if (ends[middle] <= n)
      low = middle + 1;
    else
      high = middle;
  }
  return {.b = low, .begin = low > 0 ? ends[low - 1] : 0, .end = ends[low]};
}

/// Grid [kSMs, groups of tokens].
__global__ void __launch_bounds__(kThreads, 2) score(const __grid_constant__ ScoreArguments a) {
  auto& shared = *reinterpret_cast<ScoreShared*>(ptx::dynamic_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first_token = static_cast<int>(blockIdx.y) * a.group_tokens;

  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();  // whose prologue may read what we may read
  if (warp == kWarps && lane == 31) {
    shared.barriers.init(kWarps);
    ptx::init_barrier(&shared.q_full, 1);
    ptx::fence_barrier_init();
    ptx::prefetch_map(&a.k);
  }
  sum_blocks(shared, a.batch, first_token, a.columns);

  // At most kMaxSequences * kMaxBlocks = 2^23 blocks.
  const uint32_t total = a.batch.sequences > 0 ? shared.ends[a.batch.sequences - 1] : 0;
  const auto share = [&](uint32_t cta) { return static_cast<int>(total * cta / kSMs); };
  const int first = share(blockIdx.x), last = share(blockIdx.x + 1);
  const auto find = [&](int n) { return place_of(shared.ends, a.batch.sequences, n); };
  RingPosition<kScoreStages> position;

  // Producer: pages are looked up 32 blocks at a time.
  if (warp == kWarps) {
    for (int n0 = first; n0 < last; n0 += 32) {
      int page = -1;
      if (n0 + lane < last) {
        const Place place = find(n0 + lane);
        page = a.batch.page(a.batch.sequence(place.b), n0 + lane - place.begin);
      }
#pragma unroll 1
      for (int n = n0; n < min(n0 + 32, last); ++n) {
        const int p = __shfl_sync(0xffffffff, page, n - n0);
        if (lane == 0) {
          position.wait_empty(shared.barriers);
          // A page that does not exist lies outside the tensor: zeros.
          load_tile(shared.ring[position.stage], &a.k, &shared.barriers.full[position.stage], 0, 0,
                    p, ptx::CacheHint::kEvictFirst);
        }
        position.advance();
      }
    }
    return;
  }

  // Consumers.
  Place place;
  DeviceSequence sequence{};
  Operand q;
  uint32_t q_parity = 0;
  int visible[2] = {};  // keys that this thread's two rows see
  int fewest = 0;       // that any row sees
  for (int n0 = first; n0 < last; n0 += kWarps) {
    const int side = (n0 - first) / kWarps % 2;
    for (int n = n0; n < min(n0 + kWarps, last); ++n) {
      if (!place.has(n)) {  // another sequence: its queries
        place = find(n);
        sequence = a.batch.sequence(place.b);
        join_consumers();  // all have left the queries before
        if (threadIdx.x == 0) {
          ptx::arrive_expect(&shared.q_full,
                             a.group_tokens * a.heads * kDim * sizeof(__nv_bfloat16));
          load_panels(shared.q, &a.q, &shared.q_full, 0, sequence.q_begin + first_token, 0);
        }
        const auto seen = [&](int row) {
          return sequence.visible(first_token + a.token_of(row), kBlock, a.batch.causal);
        };
        visible[0] = seen(lane / 4), visible[1] = seen(lane / 4 + 8), fewest = seen(0);
        ptx::wait(&shared.q_full, q_parity);
        q_parity ^= 1;
        load_rows(q, shared.q);
      }

      // S = Q K^T of 16 keys, then their maximum.
      Operand k;
      float s[8] = {}, max[2];
      position.wait_full(shared.barriers);
      load_keys(k, shared.ring[position.stage], warp * kKeysPerWarp);
      release(&shared.barriers.empty[position.stage]);
      position.advance();
      multiply(s, q, k);
      const int key = (n - place.begin) * kBlock;
      if (key + kBlock > fewest) {
        const int own = key + warp * kKeysPerWarp;
        mask_columns(s, {visible[0] - own, visible[1] - own});
      }
      row_max(s, max);
      if (lane % 4 == 0) {
        shared.maxima[side][n - n0][lane / 4][warp] = max[0];
        shared.maxima[side][n - n0][lane / 4 + 8][warp] = max[1];
      }
    }
    join_consumers();

    // Warp w has block w of the last kWarps, a lane per row.
    const int n = n0 + warp, i = first_token + a.token_of(lane);
    if (n < last && lane < a.group_tokens * a.heads) {
      const Place at = place.has(n) ? place : find(n);
      const DeviceSequence s = at.b == place.b ? sequence : a.batch.sequence(at.b);
      float max = -INFINITY;
      for (float other : shared.maxima[side][warp][lane]) max = fmaxf(max, other);
      const int64_t row = int64_t{s.q_begin} * a.heads + first_token * a.heads + lane;
      if (i < s.q_len) a.scores[row * a.columns + n - at.begin] = max;
    }
    __syncwarp();
  }
}

}  // namespace msa::cuda::sm90::decode
