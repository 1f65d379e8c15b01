// Attention over one tile of keys, as every tensor-core kernel computes it: scores Q K^T, an online
// softmax over them in registers, and P V with the probabilities as the A operand.
//
// One warpgroup holds 64 rows. A thread holds two of them, its halves h = 0, 1 (rows 16*w + l/4 +
// 8*h of warp w, lane l); element [4*j + 2*h + e] of an accumulator is column 8*j + 2*(l%4) + e.
// The four lanes of a quad (l/4 equal) share a row. "Per half" arrays are indexed by h.
//
//   float s[kKeys / 2], o[kColumns / 2], block_max[2], factor[2];
//   score_keys(s, q, row, k);  wgmma_commit, wait, pin
//   mask_columns(s, limit);                       // where not every key is visible
//   row_max(s, block_max);
//   softmax.absorb(s, block_max, scale, factor);  // s: scores in, probabilities out
//   scale_rows(o, factor);
//   pack_operand(s, p);
//   add_values(o, p, v);       wgmma_commit, wait, pin
//   ... and behind the last tile: softmax.finish(scale, inverse, lse); scale_rows(o, inverse);
#pragma once

#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda {

/// s = Q K^T of rows row .. row+63 of q, started (not committed).
template <int kRows, int kKeys, int kDim>
__device__ inline void score_keys(float (&s)[kKeys / 2], const SharedTile<kRows, kDim>& q, int row,
                                  const SharedTile<kKeys, kDim>& k) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) ptx::wgmma(s, q.k_major(row, i), k.k_major(0, i), i > 0);
}

/// The same with the queries in registers: operand i holds their columns 16*i .. 16*i+15.
template <int kKeys, int kDim>
__device__ inline void score_keys(float (&s)[kKeys / 2], const uint32_t (&q)[kDim / 16][4],
                                  const SharedTile<kKeys, kDim>& k) {
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) ptx::wgmma(s, q[i], k.k_major(0, i), i > 0);
}

/// o += P V, started (not committed).
template <int kKeys, int kDim>
__device__ inline void add_values(float (&o)[kDim / 2], const uint32_t (&p)[kKeys / 16][4],
                                  const SharedTile<kKeys, kDim>& v) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i)
    ptx::wgmma<ptx::BLayout::kNMajor>(o, p[i], v.n_major(i), true);
}

/// o = P V, started (not committed).
template <int kKeys, int kDim>
__device__ inline void set_values(float (&o)[kDim / 2], const uint32_t (&p)[kKeys / 16][4],
                                  const SharedTile<kKeys, kDim>& v) {
#pragma unroll
  for (int i = 0; i < kKeys / 16; ++i)
    ptx::wgmma<ptx::BLayout::kNMajor>(o, p[i], v.n_major(i), i > 0);
}

/// Columns limit[h] and up become -inf: the causal limit, the end of the keys, or (limit <= 0) a
/// block that this row does not attend. In a backward pass they become zeros.
template <int kCount>
__device__ inline void mask_columns(float (&s)[kCount], const int (&limit)[2],
                                    float hidden = -INFINITY) {
  const int first = 2 * static_cast<int>(threadIdx.x % 4);
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int column = 8 * (i / 4) + i % 2;
    s[i] = column < limit[i / 2 % 2] - first ? s[i] : hidden;
  }
}

/// Maximum of each row, in all lanes of its quad. NaN counts as -inf.
template <int kCount>
__device__ inline void row_max(const float (&s)[kCount], float (&max)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float even = -INFINITY, odd = -INFINITY;  // two chains: half the latency
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      even = fmaxf(even, s[4 * j + 2 * h]);
      odd = fmaxf(odd, s[4 * j + 2 * h + 1]);
    }
    max[h] = fmaxf(even, odd);
    max[h] = fmaxf(max[h], __shfl_xor_sync(0xffffffff, max[h], 1));
    max[h] = fmaxf(max[h], __shfl_xor_sync(0xffffffff, max[h], 2));
  }
}

template <int kCount>
__device__ inline void scale_rows(float (&o)[kCount], const float (&factor)[2]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) o[i] *= factor[i / 2 % 2];
}

/// Probabilities as A operands, one per 16 keys.
template <int kCount>
__device__ inline void pack_operand(const float (&s)[kCount], uint32_t (&p)[kCount / 8][4]) {
#pragma unroll
  for (int i = 0; i < kCount / 2; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(s[2 * i], s[2 * i + 1]);
    p[i / 4][i % 4] = reinterpret_cast<const uint32_t&>(pair);
  }
}

/// Exponents, logits in units of log2, of rows up to here are score * scale, whose rounding is the
/// row's own, 2^5 at most, and cancels. From here on it could exceed what 2^x bears, and scores
/// that are not equal lie 2^6 apart: there the factor is the next power of two, so that the product
/// is exact, the largest score weighs 1, and the others nothing as they should.
inline constexpr float kHugeExponent = 1 << 30;

__device__ inline bool is_huge_exponent(float exponent) {
  return fabsf(exponent) >= kHugeExponent && exponent != -INFINITY;
}
/// The factor of a row whose largest exponent is that.
__device__ inline float factor_of(float exponent, float scale) {
  const float power = __uint_as_float((__float_as_uint(scale) + 0x7fffff) & 0xff800000);
  return fabsf(exponent) < kHugeExponent ? scale : power;
}
/// The exponent of a row's largest score; ascends with it.
__device__ inline float exponent_of(float score, float scale) {
  return __fmul_rn(score, factor_of(__fmul_rn(score, scale), scale));
}
/// ln of sum * 2^max, where the row's largest exponent is `max`.
__device__ inline float lse_of(float max, float sum, float scale) {
  return fmaf(max, scale / factor_of(max, scale), log2f(sum)) * kLn2;  // exact quotient
}

/// Running softmax of the thread's two rows. `scale` is softmax_scale * log2(e), positive: the
/// exponentials are powers of two.
struct OnlineSoftmax {
  float max[2] = {-INFINITY, -INFINITY};  ///< exponent of the whole row's largest score
  float sum[2] = {0, 0};                  ///< over this lane's columns alone, until add_quad()

  /// Takes a tile's scores, whose row maxima are `tile_max`, and leaves probabilities relative to
  /// the new maximum. What was accumulated before must be multiplied by `factor`.
  /// A row without a visible key so far keeps max -inf, sum 0 and probabilities 0. Without kAnySize
  /// rows whose max becomes huge get something undefined.
  template <bool kAnySize = true, int kCount>
  __device__ void absorb(float (&s)[kCount], const float (&tile_max)[2], float scale,
                         float (&factor)[2]) {
    float by[2], shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float tile_exponent =
          kAnySize ? exponent_of(tile_max[h], scale) : __fmul_rn(tile_max[h], scale);
      const float next = fmaxf(max[h], tile_exponent);
      by[h] = kAnySize ? factor_of(next, scale) : scale;
      shift[h] = next == -INFINITY ? 0 : next;
      factor[h] = ptx::exp2_fast(max[h] - shift[h]);  // exactly 1 if unmoved
      max[h] = next;
    }
    float tile_sum[2] = {0, 0};  // by itself: a long row's sum would swallow what a tile adds
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int h = i / 2 % 2;
      s[i] = ptx::exp2_fast(fmaf(s[i], by[h], -shift[h]));
      tile_sum[h] += s[i];
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) sum[h] = fmaf(sum[h], factor[h], tile_sum[h]);
  }

  /// sum becomes that over the whole row.
  __device__ void add_quad() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 1);
      sum[h] += __shfl_xor_sync(0xffffffff, sum[h], 2);
    }
  }

  /// inverse = 1 / sum of the row, lse = ln(sum exp(scaled scores)); 0 and -inf if no key was seen.
  __device__ void finish(float scale, float (&inverse)[2], float (&lse)[2]) {
    add_quad();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool seen = sum[h] != 0;  // it may be NaN, as a score is
      inverse[h] = seen ? 1 / sum[h] : 0;
      lse[h] = seen ? lse_of(max[h], sum[h], scale) : -INFINITY;
    }
  }
};

}  // namespace msa::cuda
