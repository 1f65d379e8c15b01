// Stand-in for src/cuda/ptx/mma.cuh.
#pragma once

#include <utility>

#include "core/half.h"
#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

/// Element `half` of a pair of bf16.
inline float element_of_pair(uint64_t pair, int half) {
  return bf16_to_f32(static_cast<uint16_t>(pair >> 16 * half));
}

/// Two rows of a k16 step of A.
struct ARows {
  float at[2][16];
};
/// Those of this lane; A lies in the registers of its warp.
inline ARows rows_of_warp(const uint32_t (&a)[4]) {
  const emulator::Words* words = emulator::cta->exchange({a[0], a[1], a[2], a[3]});
  const int quad = emulator::cta->current->lane() / 4 * 4;
  ARows rows;
  for (int h = 0; h < 2; ++h)
    for (int k = 0; k < 16; ++k)
      rows.at[h][k] = element_of_pair(words[quad + k % 8 / 2][k / 8 * 2 + h], k % 2);
  return rows;
}

/// d: four registers.
inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulator::cta->current->lane();
  const ARows rows = rows_of_warp(a);
  const emulator::Words* columns = emulator::cta->exchange({b0, b1});
  for (int e = 0; e < 2; ++e) {
    const int column = 2 * (lane % 4) + e;
    for (int h = 0; h < 2; ++h) {
      float sum = 0;
      for (int k = 0; k < 16; ++k)
        sum += rows.at[h][k] * element_of_pair(columns[column * 4 + k % 8 / 2][k / 8], k % 2);
      d[2 * h + e] += sum;
    }
  }
  __syncwarp();  // all lanes have read before one goes on
}

/// place(lane, e): row and column of element e of the pair that the lane gets of each matrix.
template <class Place>
void load_matrices(uint32_t (&m)[4], const void* row, const Place& place) {
  const emulator::Words* rows = emulator::cta->exchange({reinterpret_cast<uintptr_t>(row)});
  for (int i = 0; i < 4; ++i) {
    uint16_t pair[2];
    for (int e = 0; e < 2; ++e) {
      const auto [r, c] = place(emulator::cta->current->lane(), e);
      std::memcpy(&pair[e], reinterpret_cast<const uint16_t*>(rows[8 * i + r][0]) + c, 2);
    }
    std::memcpy(&m[i], pair, sizeof(pair));
  }
  __syncwarp();  // all lanes have read before one goes on
}
inline void load_matrices(uint32_t (&m)[4], const void* row) {
  load_matrices(m, row, [](int lane, int e) { return std::pair(lane / 4, lane % 4 * 2 + e); });
}
inline void store_matrices(void* row, const uint32_t (&m)[4]) {
  const emulator::Words* rows = emulator::cta->exchange({reinterpret_cast<uintptr_t>(row)});
  const int lane = emulator::cta->current->lane();
  for (int i = 0; i < 4; ++i)
    std::memcpy(reinterpret_cast<uint32_t*>(rows[8 * i + lane / 4][0]) + lane % 4, &m[i], 4);
  __syncwarp();  // all lanes have stored before one goes on
}
inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  load_matrices(m, row, [](int lane, int e) { return std::pair(lane % 4 * 2 + e, lane / 4); });
}

}  // namespace msa::cuda::ptx
