// AMX: tiles of 16 rows x 64 bytes. A register tile is 2 x 2 of them: 32 rows x 32 columns, one
// step of depth 32 = four products (16 cycles each) for two loads of A and two of B. Elements are
// pairs of bf16.
#pragma once

#include "cpu/avx512/isa.h"

namespace msa::cpu {

/// Palette 1, eight tiles of 16 rows x 64 bytes. In memory for good: g++ 12's _tile_loadconfig says
/// that it reads only eight bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14]{};
  uint16_t bytes[16]{64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16]{16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kTileConfig{};

struct Amx : Avx512Vector {
  using Elem = uint16_t;
  static constexpr int kRows = 32, kCols = 32, kPair = 2, kDepthStep = 32, kChunk = 32;
  static constexpr bool kScatters = false;

  template <DType T>
  static MSA_INLINE Vec load_unit(const std::byte* p) {
    return _mm512_castsi512_ps(_mm512_loadu_si512(p));
  }
  /// 32 elements of rows a and b as 32 pairs.
  static MSA_INLINE void interleave(const std::byte* a, const std::byte* b, uint16_t* out) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    const __m512i low = _mm512_unpacklo_epi16(x, y), high = _mm512_unpackhi_epi16(x, y);
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi64(low, second, high));
  }
  static MSA_INLINE void store_p(uint16_t* p, Vec v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)));
  }

  /// A thread holds the tile state only while it computes.
  static MSA_INLINE void begin() { _tile_loadconfig(&kTileConfig); }
  static MSA_INLINE void end() { _tile_release(); }

  /// Tile products on registers alone; returns the FLOPs.
  static MSA_INLINE double burn(int64_t rounds) {
    begin();
    for (int64_t i = 0; i < rounds / 16; ++i) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    end();
    return 4.0 * 16 * 16 * 32 * 2 * static_cast<double>(rounds / 16);
  }

  /// Buffers of A and C are padded to kChunk rows: whole groups of 16 rows are read and written.
  template <int R>
  static MSA_INLINE void tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t depth,
                              float* const* c, int64_t ldc, int64_t col, bool add) {
    constexpr bool kTall = R > 16;
    const auto lda_bytes = static_cast<size_t>(lda * 2), ldc_bytes = static_cast<size_t>(ldc * 4);
    float* out = c[0] + col;
    asm volatile("" ::: "memory");  // g++ 12's tile loads do not say that they read memory
    if (add) {
      _tile_loadd(0, out, ldc_bytes);
      _tile_loadd(1, out + 16, ldc_bytes);
      if constexpr (kTall) {
        _tile_loadd(2, out + 16 * ldc, ldc_bytes);
        _tile_loadd(3, out + 16 * ldc + 16, ldc_bytes);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      if constexpr (kTall) {
        _tile_zero(2);
        _tile_zero(3);
      }
    }
    for (int64_t d = 0; d < depth; d += 32) {
      _tile_loadd(6, panel + d * kCols, 128);
      _tile_loadd(7, panel + d * kCols + 32, 128);
      _tile_loadd(4, a + d, lda_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTall) {
        _tile_loadd(5, a + 16 * lda + d, lda_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, out, ldc_bytes);
    _tile_stored(1, out + 16, ldc_bytes);
    if constexpr (kTall) {
      _tile_stored(2, out + 16 * ldc, ldc_bytes);
      _tile_stored(3, out + 16 * ldc + 16, ldc_bytes);
    }
  }
};

}  // namespace msa::cpu
