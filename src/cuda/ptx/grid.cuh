// Warps, warpgroups, and grids that follow each other.
#pragma once

#include <cstdint>

namespace msa::cuda::ptx {

/// Moves registers between warpgroups: all four warps of one, a multiple of 8 in 24..256.
template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

/// The thread's number in its warp, read anew each time: addresses made of it are not kept in
/// registers across a loop that has none to spare.
__device__ inline int lane_id() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

/// True in one thread of a converged warp.
__device__ inline bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, p;\n}\n"
      : "=r"(chosen));
  return chosen != 0;
}

/// Everything the grid ahead in the stream wrote is visible afterwards (see LaunchShape::overlap).
__device__ inline void wait_for_previous_grid() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
/// The grid behind may start its prologue once every CTA has said so or ended.
__device__ inline void allow_next_grid() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

/// The smaller one, NaN if one is.
__device__ inline float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

/// 2^x, one instruction, about 2 ulp; -inf gives 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace msa::cuda::ptx
