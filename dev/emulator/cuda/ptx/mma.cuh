// Stand-in for src/cuda/ptx/mma.cuh.
#pragma once

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

inline void load_matrices(uint32_t (&m)[4], const void* row) {
  const emulator::Words* rows = emulator::cta->exchange({reinterpret_cast<uintptr_t>(row)});
  const int lane = emulator::cta->current->lane();
  for (int i = 0; i < 4; ++i) {
    const auto* from = reinterpret_cast<const unsigned char*>(rows[8 * i + lane / 4][0]);
    std::memcpy(&m[i], from + lane % 4 * 4, 4);
  }
  __syncwarp();  // all lanes have read before one goes on
}

}  // namespace msa::cuda::ptx
