// Thread block clusters: CTAs that run at the same time and reach into each other's shared memory.
// A kernel launched without a cluster is a cluster of one; what sends to CTAs is illegal there.
#pragma once

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

__device__ inline uint32_t cluster_id() {  // along x
  uint32_t id;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(id));
  return id;
}

/// Once wait_cluster() returns, all CTAs of the cluster exist and their shared memory may be
/// written. All threads of a CTA call both; waiting joins them as __syncthreads() does. Orders
/// nothing else.
__device__ inline void arrive_cluster() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ inline void wait_cluster() {
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

/// Stores to where `to` (in this CTA's shared memory, aligned to the size of T: 4, 8 or 16 bytes)
/// lies in CTA `rank`; its barrier at the place of `barrier` counts the bytes, and whoever waits
/// for that one sees them. No fence, no answer.
template <class T>
__device__ inline void store_to_cta(uint32_t rank, T* to, const T& value, Barrier* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  uint32_t address, signal;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(signal)
      : "r"(shared_address(barrier)), "r"(rank));
  const auto* words = reinterpret_cast<const uint32_t*>(&value);
  if constexpr (sizeof(T) == 4) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
        "r"(words[0]), "r"(signal)
        : "memory");
  } else if constexpr (sizeof(T) == 8) {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
            address),
        "r"(words[0]), "r"(words[1]), "r"(signal)
        : "memory");
  } else {
    asm volatile(
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
        "[%5];" ::"r"(address),
        "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3]), "r"(signal)
        : "memory");
  }
}

}  // namespace msa::cuda::ptx
