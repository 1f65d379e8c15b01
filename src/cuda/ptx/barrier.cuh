// Barriers. mbarriers live in shared memory and count arrivals and bytes of asynchronous copies;
// named barriers join a number of warps; the proxy fence orders ordinary stores before what the
// copy engine or the tensor cores read.
#pragma once

#include <cuda/ptx>

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace msa::cuda::ptx {

namespace cptx = ::cuda::ptx;

using Barrier = uint64_t;  // an mbarrier object, in shared memory

/// One thread, before fence_barrier_init() and a barrier over all users.
__device__ inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  cptx::mbarrier_init(barrier, arrivals);
}
/// Makes initialised mbarriers visible to the copy engine.
__device__ inline void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
/// Arrives, and announces `bytes` that asynchronous copies will deliver in this phase.
__device__ inline void arrive_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
/// Returns when the phase of that parity has completed.
__device__ inline void wait(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

/// Joins `threads` threads (a multiple of 32) at named barrier `id` (1..15; 0 is __syncthreads).
__device__ inline void join(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/// The same; whether `vote` is true of any of the threads.
__device__ inline bool join_any(uint32_t id, uint32_t threads, bool vote) {
  int any;
  asm volatile(
      "{\n"
      ".reg .pred own, all;\n"
      "setp.ne.s32 own, %3, 0;\n"
      "bar.red.or.pred all, %1, %2, own;\n"
      "selp.s32 %0, 1, 0, all;\n"
      "}\n"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(vote))
      : "memory");
  return any != 0;
}
/// Ordinary stores to shared memory become visible to TMA and wgmma; each writer, then a barrier.
__device__ inline void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

}  // namespace msa::cuda::ptx
