// Stand-in for src/cuda/ptx/grid.cuh.
#pragma once

#include <cmath>

#include "cuda_runtime.h"

namespace msa::cuda::ptx {

template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

inline int lane_id() { return emulator::cta->current->lane(); }
inline bool elect_one() { return lane_id() == 0; }

inline void wait_for_previous_grid() {}
inline void allow_next_grid() {}

/// Other CTAs may count, so a warp that waits is no sign of a deadlock, not at first.
inline void wait_for_count(const int32_t* counter, int32_t n) {
  for (int64_t turns = 0; __atomic_load_n(counter, __ATOMIC_SEQ_CST) < n; ++turns) {
    if (turns == 10'000'000) emulator::fail("deadlock: nobody counts");
    emulator::cta->progress();
    emulator::cta->yield();
  }
}

inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace msa::cuda::ptx
