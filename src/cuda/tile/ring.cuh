// A ring of shared-memory stages between one producer warp and its consumers. Both sides count the
// same steps; `full` says that a stage's bytes have arrived, `empty` that its readers are done.
//
// Words that threads store beside what TMA brings are ordered by these barriers only from a thread
// that arrives to one that waits: every thread that stores or reads such words arrives for itself,
// or lane 0 alone does all three for its warp (read_for_warp, release). compute-sanitizer's
// racecheck takes it the same way.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda {

template <int kStages>
struct RingBarriers {
  ptx::Barrier full[kStages];
  ptx::Barrier empty[kStages];

  /// One thread; `readers` arrivals release a stage, `writers` announce what it will hold.
  /// fence_barrier_init() and a barrier must follow.
  __device__ void init(uint32_t readers, uint32_t writers = 1) {
    for (int i = 0; i < kStages; ++i) {
      ptx::init_barrier(&full[i], writers);
      ptx::init_barrier(&empty[i], readers);
    }
  }
};

/// Where one side of the ring stands. The producer's first lap finds every stage empty.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t lap = 0;  ///< parity of the current lap

  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      lap ^= 1;
    }
  }
  __device__ void wait_full(RingBarriers<kStages>& ring) const {
    ptx::wait(&ring.full[stage], lap);
  }
  __device__ void wait_empty(RingBarriers<kStages>& ring) const {
    ptx::wait(&ring.empty[stage], lap ^ 1);
  }
};

/// What the producer stored about a stage: read by lane 0, which also releases the stage, so that
/// one thread's order is all that keeps the next store behind this read. All lanes call.
template <class T>
__device__ inline T read_for_warp(const T& stored) {
  constexpr int kWords = sizeof(T) / sizeof(int);
  static_assert(sizeof(T) == kWords * sizeof(int));
  int words[kWords] = {};
  if (threadIdx.x % 32 == 0) memcpy(words, &stored, sizeof(T));
#pragma unroll
  for (int& word : words) word = __shfl_sync(0xffffffff, word, 0);
  T value;
  memcpy(&value, words, sizeof(T));
  return value;
}

/// A warp has read what a stage held, whose `empty` this is. All its lanes call.
__device__ inline void release(ptx::Barrier* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) ptx::arrive(empty);
}

}  // namespace msa::cuda
