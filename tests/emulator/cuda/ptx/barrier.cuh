// Stand-in for src/cuda/ptx/barrier.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/shared.cuh"

namespace msa::cuda::ptx {

using Barrier = uint64_t;

/// What a Barrier's 64 bits hold here.
struct BarrierState {
  int16_t pending;  ///< arrivals that the phase still waits for
  int16_t arrivals;
  int32_t bytes : 31;  ///< announced and not yet there; negative: there before they were announced
  uint32_t phase : 1;
};
static_assert(sizeof(BarrierState) == sizeof(Barrier));

/// Takes arrivals and adds bytes; the phase ends when nothing is left to wait for.
inline void update(Barrier* barrier, int arrivals, int64_t bytes) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof(state));
  state.pending = static_cast<int16_t>(state.pending - arrivals);
  state.bytes = static_cast<int32_t>(state.bytes + bytes);
  if (state.pending < 0) emulator::fail("more arrivals at an mbarrier than its phase has");
  if (state.pending == 0 && state.bytes < 0)
    emulator::fail("more bytes came to an mbarrier than were announced");
  if (state.pending == 0 && state.bytes == 0) {
    state.pending = state.arrivals;
    state.phase ^= 1;
    emulator::cta->progress();
  }
  std::memcpy(barrier, &state, sizeof(state));
}

inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  const auto count = static_cast<int16_t>(arrivals);
  const BarrierState state{.pending = count, .arrivals = count, .bytes = 0, .phase = 0};
  std::memcpy(barrier, &state, sizeof(state));
}
inline void fence_barrier_init() {}

inline void arrive(Barrier* barrier) { update(barrier, 1, 0); }
inline void arrive_expect(Barrier* barrier, uint32_t bytes) { update(barrier, 1, bytes); }
inline void wait(Barrier* barrier, uint32_t parity) {
  emulator::cta->wait_until([&] {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    return state.phase != (parity & 1);
  });
}

inline void join(uint32_t id, uint32_t threads) { emulator::cta->join(id, threads); }
inline bool join_any(uint32_t id, uint32_t threads, bool vote) {
  return emulator::cta->join(id, threads, vote);
}
inline void fence_async_proxy() {}

}  // namespace msa::cuda::ptx
