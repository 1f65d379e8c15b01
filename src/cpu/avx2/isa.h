// AVX2 with FMA and F16C: 16 registers of 8 floats, so 6 rows x 16 columns of sums, one line of B,
// one broadcast.
#pragma once

#include <immintrin.h>

#include "cpu/generic/tile.h"

namespace msa::cpu {

struct Avx2 {
  using Elem = float;
  using Vec = __m256;
  static constexpr int kLanes = 8, kRows = 6, kCols = 16, kPair = 1, kDepthStep = 1, kChunk = 48;
  static constexpr bool kScatters = true;

  static MSA_INLINE Vec zero() { return _mm256_setzero_ps(); }
  static MSA_INLINE Vec set1(float x) { return _mm256_set1_ps(x); }
  static MSA_INLINE Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static MSA_INLINE void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static MSA_INLINE Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
  static MSA_INLINE Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
  static MSA_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static MSA_INLINE Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }  // NaN in a gives b

  static MSA_INLINE float reduce_max(Vec v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static MSA_INLINE float reduce_add(Vec v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }

  /// 2^x for x <= 0; below -126 exactly 0. Degree-5 minimax on [-1/2, 1/2], relative error 8e-8.
  static MSA_INLINE Vec exp2(Vec x) {
    x = _mm256_max_ps(set1(-127.0f), x);  // NaN stays NaN
    const Vec whole = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const Vec f = _mm256_sub_ps(x, whole);
    Vec y = fma(set1(0.001327647129073739f), f, set1(0.009675540961325169f));
    y = fma(y, f, set1(0.05550713092088699f));
    y = fma(y, f, set1(0.24022120237350464f));
    y = fma(y, f, set1(0.6931469440460205f));
    y = fma(y, f, set1(1.0000001192092896f));
    const __m256i exponent =
        _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
    return mul(y, _mm256_castsi256_ps(exponent));
  }

  template <DType T>
  static MSA_INLINE Vec load_as(const std::byte* p) {
    if constexpr (T == DType::kF32) return load(reinterpret_cast<const float*>(p));
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    if constexpr (T == DType::kF16) return _mm256_cvtph_ps(half);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  template <DType T>
  static MSA_INLINE void store_as(std::byte* p, Vec v) {
    if constexpr (T == DType::kF32) {
      store(reinterpret_cast<float*>(p), v);
    } else {
      __m128i half;
      if constexpr (T == DType::kF16) {
        half = _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
      } else {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
        const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
        const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
        rounded =
            _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
        const __m256i packed =
            _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0x08);
        half = _mm256_castsi256_si128(packed);
      }
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
    }
  }
  template <DType T>
  static MSA_INLINE Vec load_unit(const std::byte* p) {
    return load_as<T>(p);
  }
  static MSA_INLINE void store_p(float* p, Vec v) { store(p, v); }

  static MSA_INLINE void transpose(Vec (&v)[8]) {
    Vec t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]);
      t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    }
    Vec u[8];
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
      u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
      u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
      u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
      v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
    }
  }

  static MSA_INLINE Vec load_line(const float* p) { return load(p); }
  static MSA_INLINE Vec broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static MSA_INLINE Vec dot(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
  template <int R>
  static MSA_INLINE void tile(const float* a, int64_t lda, const float* panel, int64_t depth,
                              float* const* c, int64_t, int64_t col, bool add) {
    register_tile<Avx2, R>(a, lda, panel, depth, c, col, add);
  }

  static MSA_INLINE void begin() {}
  static MSA_INLINE void end() {}
};

}  // namespace msa::cpu
