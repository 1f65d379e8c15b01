// Shared memory.
#pragma once

#include <cstdint>

namespace msa::cuda::ptx {

/// The dynamic shared memory of the CTA, as many bytes as the launch says; 1024 are the atom of the
/// 128-byte swizzle. Not a function: what one returns, nvcc does not fold into its caller's
/// addresses.
extern __shared__ __align__(1024) unsigned char dynamic_shared[];

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace msa::cuda::ptx
