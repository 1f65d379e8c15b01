// A bf16 tile in shared memory as TMA writes it and wgmma reads it: panels of 64 columns (128
// bytes a row), swizzled so that the eight 16-byte units of a row move by its row number mod 8.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda {

inline constexpr int kPanelColumns = 64;  // 128 bytes: one swizzle row

/// kRows x kColumns, filled by kColumns/64 boxes of [kRows,64], one per panel.
template <int kRows, int kColumns>
struct alignas(1024) SharedTile {
  static_assert(kRows % 8 == 0 && kColumns % kPanelColumns == 0, "whole swizzle atoms of 8 x 64");
  static constexpr int kPanels = kColumns / kPanelColumns;
  static constexpr uint32_t kBytes = kRows * kColumns * 2;
  static constexpr uint32_t kPanelBytes = kRows * kPanelColumns * 2;

  __nv_bfloat16 data[kPanels][kRows][kPanelColumns];

  /// Where element (row, column) lies, in elements from `data`. Units of 8 columns stay together.
  __device__ static constexpr int offset(int row, int column) {
    const int panel = column / kPanelColumns, unit = column % kPanelColumns / 8;
    return (panel * kRows + row) * kPanelColumns + ((unit ^ (row & 7)) * 8) + column % 8;
  }
  __device__ __nv_bfloat16* at(int row, int column) { return &data[0][0][0] + offset(row, column); }
  __device__ __nv_bfloat16* panel(int p) { return &data[p][0][0]; }

  /// Operand whose inner dimension runs along the columns (Q and K of Q K^T): the rows from `row`
  /// (a multiple of 8), columns 16*step .. 16*step+15.
  __device__ uint64_t k_major(int row, int step) const {
    const int panel = step / 4;
    return descriptor(&data[panel][row][0] + step % 4 * 16, 1);
  }
  /// Operand whose inner dimension runs along the rows (V of P V): rows 16*step .. 16*step+15, all
  /// columns from panel `first`.
  __device__ uint64_t n_major(int step, int first = 0) const {
    return descriptor(&data[first][16 * step][0], kPanelBytes);
  }

 private:
  /// Matrix descriptor, PTX ISA "asynchronous warpgroup level matrix shared memory layout":
  /// address, leading and stride byte offset in units of 16 bytes, swizzle mode 1 = 128 bytes. The
  /// stride goes from one group of 8 rows to the next, the leading offset from panel to panel.
  __device__ static uint64_t descriptor(const void* start, uint32_t leading_bytes) {
    constexpr uint64_t kStride = 8 * kPanelColumns * 2;
    uint64_t d = (ptx::shared_address(start) & 0x3ffff) >> 4;
    d |= static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16;
    d |= (kStride >> 4) << 32;
    d |= uint64_t{1} << 62;
    return d;
  }
};

}  // namespace msa::cuda
