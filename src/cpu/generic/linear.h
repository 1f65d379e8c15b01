// y = x w^T on f32 panels of w: the attention tile with weights in place of keys.
#pragma once

#include "cpu/generic/tile.h"
#include "cpu/kernels.h"

namespace msa::cpu {

inline constexpr int64_t kLinearDepth = 256;    // of a slice: rows of x and a panel stay in L1
inline constexpr int64_t kLinearColumns = 512;  // of a task: decode (one row) has several of them

/// One task: up to kChunk rows, columns [col0,col1).
template <class Isa>
void linear_task(const float* x, int64_t ldx, int64_t rows, const float* panels, int64_t col0,
                 int64_t col1, int64_t n, int64_t k, float* y, int64_t ldy) {
  alignas(
      64) float last[Isa::kChunk * Isa::kCols];  // a panel that reaches past n is computed aside
  for (int64_t col = col0; col < col1; col += Isa::kCols) {
    const bool whole = col + Isa::kCols <= n;
    float* c[Isa::kChunk];
    for (int64_t r = 0; r < rows; ++r) c[r] = whole ? y + r * ldy + col : last + r * Isa::kCols;
    for (int64_t d = 0; d < k; d += kLinearDepth) {
      gemm<Isa>(x + d, ldx, rows, panels + col * k + d * Isa::kCols, 0, least(kLinearDepth, k - d),
                Isa::kCols, c, 0, d > 0);
    }
    for (int64_t r = 0; r < rows && !whole; ++r) {
      std::memcpy(y + r * ldy + col, c[r], static_cast<size_t>(n - col) * sizeof(float));
    }
  }
}

template <class Isa>
void linear(const float* x, int64_t ldx, int64_t m, const float* panels, int64_t n, int64_t k,
            float* y, int64_t ldy, Threads& threads) {
  const int64_t groups = (n + kLinearColumns - 1) / kLinearColumns;
  threads.parallel_for((m + Isa::kChunk - 1) / Isa::kChunk * groups, [&](int64_t task, int) {
    const int64_t row = task / groups * Isa::kChunk, col = task % groups * kLinearColumns;
    linear_task<Isa>(x + row * ldx, ldx, least(Isa::kChunk, m - row), panels, col,
                     least(col + kLinearColumns, n), n, k, y + row * ldy, ldy);
  });
}

}  // namespace msa::cpu
