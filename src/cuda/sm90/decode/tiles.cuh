// Tiles of the decode kernels: 16 rows against a block of keys. Eight warps, the consumers, share a
// block: 16 keys each of Q K^T, 16 columns each of P V; a ninth loads.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/cta_topk.cuh"
#include "cuda/sm90/decode/config.h"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda::sm90::decode {

inline constexpr int kWarps = 8;
inline constexpr int kConsumers = 32 * kWarps;
inline constexpr int kThreads = kConsumers + 32;
inline constexpr int kKeysPerWarp = kBlock / kWarps;   // 16: two columns of mma tiles
inline constexpr int kColumnsPerWarp = kDim / kWarps;  // 16

/// Joins the consumers alone.
inline constexpr uint32_t kConsumerBarrier = 1;
__device__ inline void join_consumers() { ptx::join(kConsumerBarrier, kConsumers); }

/// Of one row, chosen by the consumers.
using TopK = CtaTopK<kWarps, kMaxBlocks, kConsumerBarrier>;
static_assert(TopK::kBest == kMaxChosen);

using KeyTile = SharedTile<kBlock, kDim>;
using RowTile = SharedTile<kRows, kDim>;

/// Operands of eight k16 steps: 16 rows x 128, or 128 x 16 columns.
using Operand = uint32_t[kDim / 16][4];
static_assert(kDim == kBlock, "Q K^T and P V have as many steps");

/// A: step `i` of a 16-row tile.
__device__ inline void load_rows(uint32_t (&a)[4], RowTile& tile, int i) {
  const int lane = threadIdx.x % 32;
  ptx::load_matrices(a, tile.at(lane % 16, 16 * i + lane / 16 * 8));
}
__device__ inline void load_rows(Operand& a, RowTile& tile) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) load_rows(a[i], tile, i);
}
/// B of Q K^T: 16 keys from `key`.
__device__ inline void load_keys(Operand& b, KeyTile& k, int key) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i)
    ptx::load_matrices(b[i], k.at(key + lane / 16 * 8 + lane % 8, 16 * i + lane / 8 % 2 * 8));
}
/// B of P V: 16 columns from `column`.
__device__ inline void load_values(Operand& b, KeyTile& v, int column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kBlock / 16; ++i)
    ptx::load_matrices_transposed(b[i], v.at(16 * i + lane % 16, column + lane / 16 * 8));
}

/// d += A B, 16 x 16: d[4*j + 2*h + e] as in tile/online_softmax.cuh. rows(i) is step i of A. Two
/// chains of sums, since a product waits for the sum before it.
template <class Rows>
__device__ inline void multiply(float (&d)[8], const Rows& rows, const Operand& b) {
  float odd[8] = {};
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    float* sum = i % 2 == 0 ? d : odd;
    const auto& a = rows(i);
    ptx::mma(sum, a, b[i][0], b[i][1]);
    ptx::mma(sum + 4, a, b[i][2], b[i][3]);
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) d[i] += odd[i];
}
__device__ inline void multiply(float (&d)[8], const Operand& a, const Operand& b) {
  multiply(d, [&](int i) -> const uint32_t(&)[4] { return a[i]; }, b);
}
__device__ inline void multiply(float (&d)[8], RowTile& a, const Operand& b) {
  uint32_t step[4];
  multiply(
      d,
      [&](int i) -> const uint32_t(&)[4] {
        load_rows(step, a, i);
        return step;
      },
      b);
}

}  // namespace msa::cuda::sm90::decode
