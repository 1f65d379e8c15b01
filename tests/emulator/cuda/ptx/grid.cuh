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

inline float min_nan(float a, float b) { return a < b || a != a ? a : b; }
inline float exp2_fast(float x) { return std::exp2(x); }

}  // namespace msa::cuda::ptx
