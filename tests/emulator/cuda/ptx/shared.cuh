// Stand-in for src/cuda/ptx/shared.cuh.
#pragma once

#include "cuda_runtime.h"

namespace msa::cuda::ptx {

using emulator::dynamic_shared;

inline uint32_t shared_address(const void* pointer) { return emulator::shared_offset(pointer); }

}  // namespace msa::cuda::ptx
