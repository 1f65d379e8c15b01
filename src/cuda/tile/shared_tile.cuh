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
    return descriptor(1) + ((step / 4 * kPanelBytes + row * kRowBytes + step % 4 * 32) >> 4);
  }
  /// Operand whose inner dimension runs along the rows (V of P V): rows 16*step .. 16*step+15, all
  /// columns from panel `first`.
  __device__ uint64_t n_major(int step, int first = 0) const {
    return descriptor(kPanelBytes) + ((first * kPanelBytes + step * 16 * kRowBytes) >> 4);
  }

 private:
  static constexpr uint32_t kRowBytes = kPanelColumns * 2;

  /// Matrix descriptor of the tile's first element, PTX ISA "asynchronous warpgroup level matrix
  /// shared memory layout": address, leading and stride byte offset in units of 16 bytes, swizzle
  /// mode 1 = 128 bytes. The stride goes from one group of 8 rows to the next, the leading offset
  /// from panel to panel. Other elements are added to the address, which needs no carry.
  __device__ uint64_t descriptor(uint32_t leading_bytes) const {
    uint64_t d = (ptx::shared_address(data) & 0x3ffff) >> 4;
    d |= static_cast<uint64_t>((leading_bytes & 0x3ffff) >> 4) << 16;
    d |= uint64_t{8 * kRowBytes >> 4} << 32;
    d |= uint64_t{1} << 62;
    return d;
  }
};

}  // namespace msa::cuda
