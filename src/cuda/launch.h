// What every launch function shares: the stream, errors, and a launch that can overlap its
// predecessor's tail.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "core/text.h"
#include "msa/backend.h"

namespace msa::cuda {

inline cudaStream_t stream_of(const Queue& queue) {
  return static_cast<cudaStream_t>(queue.cuda_stream);
}

/// kInternal with CUDA's own words, or ok.
inline Status check_cuda(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return {};
  return error(StatusCode::kInternal, what, ": ", cudaGetErrorString(result));
}

/// Shape of one kernel launch. `overlap` lets the kernel start before the one ahead of it in the
/// stream has ended (programmatic dependent launch); it must then call
/// ptx::wait_for_previous_grid() before it reads anything that one wrote.
struct LaunchShape {
  dim3 grid;
  dim3 block;
  uint32_t shared_bytes = 0;
  bool overlap = false;
  uint32_t cluster = 1;  ///< CTAs of one cluster, along x: 1..16, divides grid.x
};

/// Enqueues kernel(args...). Never waits; can be captured. An empty grid is no work.
template <class... Formal, class... Actual>
Status launch(const char* name, void (*kernel)(Formal...), const LaunchShape& shape,
              cudaStream_t stream, Actual&&... args) {
  if (shape.grid.x == 0 || shape.grid.y == 0 || shape.grid.z == 0) return {};
  if (shape.shared_bytes > 48 * 1024) {
    MSA_TRY(check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shape.shared_bytes)),
                       name));
  }
  constexpr uint32_t kPortableCluster = 8;
  if (shape.cluster > kPortableCluster) {
    MSA_TRY(check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                       name));
  }
  cudaLaunchAttribute attributes[2]{};
  uint32_t count = 0;
  if (shape.overlap) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (shape.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {.x = shape.cluster, .y = 1, .z = 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Formal>(args)...), name);
}

/// ceil(a / b) for a >= 0, b > 0.
template <class A, class B>
constexpr auto ceil_div(A a, B b) {
  return (a + b - 1) / b;
}

}  // namespace msa::cuda
