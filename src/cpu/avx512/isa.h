// AVX-512: 32 registers of 16 floats, f32 math for every storage type. (The bf16 dot product of
// AVX512-BF16 runs at a quarter of the FMA rate on Sapphire Rapids: 115 against 193 GFLOP/s per
// core in this tile, so it has no kernels; bf16 tensors gain from AMX instead.)
#pragma once

#include <immintrin.h>

#include "cpu/generic/tile.h"

namespace msa::cpu {

/// Vectors of floats, shared with AMX.
struct Avx512Vector {
  using Vec = __m512;
  static constexpr int kLanes = 16;

  static MSA_INLINE Vec zero() { return _mm512_setzero_ps(); }
  static MSA_INLINE Vec set1(float x) { return _mm512_set1_ps(x); }
  static MSA_INLINE Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static MSA_INLINE void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static MSA_INLINE Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
  static MSA_INLINE Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
  static MSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static MSA_INLINE Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // NaN in a gives b
  static MSA_INLINE float reduce_max(Vec v) { return _mm512_reduce_max_ps(v); }
  static MSA_INLINE float reduce_add(Vec v) { return _mm512_reduce_add_ps(v); }

  /// 2^x for x <= 0; below -126 exactly 0. Degree-5 minimax on [-1/2, 1/2], relative error 8e-8.
  static MSA_INLINE Vec exp2(Vec x) {
    const __mmask16 normal = _mm512_cmp_ps_mask(x, set1(-126.0f), _CMP_NLT_UQ);  // NaN stays NaN
    const Vec whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec f = _mm512_sub_ps(x, whole);
    Vec y = fma(set1(0.001327647129073739f), f, set1(0.009675540961325169f));
    y = fma(y, f, set1(0.05550713092088699f));
    y = fma(y, f, set1(0.24022120237350464f));
    y = fma(y, f, set1(0.6931469440460205f));
    y = fma(y, f, set1(1.0000001192092896f));
    return _mm512_maskz_scalef_ps(normal, y, whole);
  }

  template <DType T>
  static MSA_INLINE Vec load_as(const std::byte* p) {
    if constexpr (T == DType::kF32) return load(reinterpret_cast<const float*>(p));
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    if constexpr (T == DType::kF16) return _mm512_cvtph_ps(half);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  template <DType T>
  static MSA_INLINE void store_as(std::byte* p, Vec v) {
    if constexpr (T == DType::kF32) {
      store(reinterpret_cast<float*>(p), v);
    } else {
      __m256i half;
      if constexpr (T == DType::kF16) {
        half = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
        const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
        half = _mm512_cvtepi32_epi16(
            _mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
    }
  }

  static MSA_INLINE void transpose(Vec (&v)[16]) {
    Vec t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
      t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {  // 4x4 within each 128-bit lane
      v[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
      v[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
      v[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      v[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // then the 4x4 of lanes
      const Vec low01 = _mm512_shuffle_f32x4(v[i], v[i + 4], 0x88),
                high01 = _mm512_shuffle_f32x4(v[i], v[i + 4], 0xdd);
      const Vec low23 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0x88);
      const Vec high23 = _mm512_shuffle_f32x4(v[i + 8], v[i + 12], 0xdd);
      t[i] = _mm512_shuffle_f32x4(low01, low23, 0x88);
      t[i + 4] = _mm512_shuffle_f32x4(high01, high23, 0x88);
      t[i + 8] = _mm512_shuffle_f32x4(low01, low23, 0xdd);
      t[i + 12] = _mm512_shuffle_f32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

  static MSA_INLINE void begin() {}
  static MSA_INLINE void end() {}
};

/// 8 rows x 32 columns: 16 sums hide the FMA latency twice over, and 8 divides the rows of most
/// groups.
struct Avx512 : Avx512Vector {
  using Elem = float;
  static constexpr int kRows = 12, kCols = 32, kPair = 1, kDepthStep = 1, kChunk = 48;
  static constexpr bool kScatters = true;

  template <DType T>
  static MSA_INLINE Vec load_unit(const std::byte* p) {
    return load_as<T>(p);
  }
  static MSA_INLINE void store_p(float* p, Vec v) { store(p, v); }
  static MSA_INLINE Vec load_line(const float* p) { return load(p); }
  static MSA_INLINE Vec broadcast(const float* p) { return set1(*p); }
  static MSA_INLINE Vec dot(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  template <int R>
  static MSA_INLINE void tile(const float* a, int64_t lda, const float* panel, int64_t depth,
                              float* const* c, int64_t, int64_t col, bool add) {
    register_tile<Avx512, R>(a, lda, panel, depth, c, col, add);
  }
};

}  // namespace msa::cpu
