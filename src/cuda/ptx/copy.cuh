// The tensor memory accelerator: boxes of a tensor between global and shared memory. Coordinates
// count elements, innermost first; what lies outside the tensor arrives as zeros and is not stored.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

/// What L2 should do with the bytes.
enum class CacheHint : uint64_t {
  kEvictNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
};

__device__ inline void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

/// Box of a 4-D tensor -> shared memory; its bytes arrive at `barrier`. One thread.
__device__ inline void load_box(void* to, const CUtensorMap* map, Barrier* barrier, int32_t c0,
                                int32_t c1, int32_t c2, int32_t c3,
                                CacheHint hint = CacheHint::kEvictNormal) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
      "l"(static_cast<uint64_t>(hint))
      : "memory");
}

/// Shared memory -> box of a 4-D tensor. One thread; then commit_stores() and wait_stores().
__device__ inline void store_box(const CUtensorMap* map, const void* from, int32_t c0, int32_t c1,
                                 int32_t c2, int32_t c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(shared_address(from)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
__device__ inline void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/// Until at most kPending groups of this thread still read shared memory.
template <int kPending = 0>
__device__ inline void wait_stores() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

/// `bytes` (a multiple of 16, 16-byte aligned on both sides) global -> shared memory.
__device__ inline void load_bytes(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

}  // namespace msa::cuda::ptx
