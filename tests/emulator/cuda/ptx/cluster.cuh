// Stand-in for src/cuda/ptx/cluster.cuh.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

inline uint32_t cluster_size() { return static_cast<uint32_t>(emulator::cta->cluster.ctas.size()); }
inline uint32_t cluster_rank() { return emulator::cta->rank(); }
inline uint32_t cluster_id() { return emulator::cta->block_index.x / cluster_size(); }

inline void arrive_cluster() { emulator::cta->arrive_at_cluster(); }
inline void wait_cluster() { emulator::cta->wait_for_cluster(); }

template <class T>
void store_to_cta(uint32_t rank, T* to, const T& value, Barrier* barrier) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  const uint32_t address = shared_address(to), signal = shared_address(barrier);
  if (address % sizeof(T) != 0) emulator::fail("a store to a CTA that is not aligned");
  emulator::cta->send(rank, [=, value = value] {
    std::memcpy(emulator::shared_pointer(address), &value, sizeof(T));
    update(reinterpret_cast<Barrier*>(emulator::shared_pointer(signal)), 0, -int64_t{sizeof(T)});
  });
}

}  // namespace msa::cuda::ptx
