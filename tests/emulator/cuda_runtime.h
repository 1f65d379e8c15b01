// Stand-in for the CUDA runtime and for what nvcc adds to C++: keywords, built-in variables and
// the intrinsics that the emulated kernels use. A launch returns when the grid is done.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cta.h"

#define __device__
#define __host__
#define __global__
#define __shared__ thread_local  // a CTA is a thread
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define threadIdx (emulator::cta->current->index)
#define blockIdx (emulator::cta->block_index)

// Not macros: members of launch structs have the same names.
struct LaunchedThreads {
  struct {
    operator unsigned() const { return emulator::cta->threads(); }
  } x;
};
struct LaunchedCtas {
  struct {
    operator unsigned() const { return emulator::cta->grid.x; }
  } x;
  struct {
    operator unsigned() const { return emulator::cta->grid.y; }
  } y;
  struct {
    operator unsigned() const { return emulator::cta->grid.z; }
  } z;
};
inline constexpr LaunchedThreads blockDim{};
inline constexpr LaunchedCtas gridDim{};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// ---- collectives; all lanes of a warp take part ----

inline void __syncthreads() { emulator::cta->join(0, emulator::cta->threads()); }
inline void __syncwarp(uint32_t lanes = 0xffffffff) {
  if (lanes == 0xffffffff)
    emulator::cta->exchange({});
  else
    emulator::cta->join_lanes(lanes);
}

/// What `value` is in lane `from`.
template <class T>
T value_of_lane(T value, int from) {
  return emulator::from_word<T>(emulator::cta->exchange({emulator::to_word(value)})[from][0]);
}
template <class T>
T __shfl_sync(uint32_t, T value, int from, int width = 32) {
  return value_of_lane(value, emulator::cta->current->lane() / width * width + from % width);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
  return value_of_lane(value, emulator::cta->current->lane() ^ mask);
}
template <class T>
T __shfl_up_sync(uint32_t, T value, int delta) {
  const int lane = emulator::cta->current->lane();
  return value_of_lane(value, lane < delta ? lane : lane - delta);
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
  const emulator::Words* words = emulator::cta->exchange({vote});
  uint32_t votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<uint32_t>(words[i][0]) << i;
  return votes;
}
inline bool __any_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
inline bool __all_sync(uint32_t mask, bool vote) { return __ballot_sync(mask, !vote) == 0; }
inline int __reduce_add_sync(uint32_t, int value) {
  const emulator::Words* words = emulator::cta->exchange({emulator::to_word(value)});
  int sum = 0;
  for (int i = 0; i < 32; ++i) sum += emulator::from_word<int>(words[i][0]);
  return sum;
}

/// The lanes with the same value as the calling one.
inline uint32_t __match_any_sync(uint32_t, int value) {
  const emulator::Words* words = emulator::cta->exchange({emulator::to_word(value)});
  uint32_t lanes = 0;
  for (int i = 0; i < 32; ++i)
    lanes |= static_cast<uint32_t>(emulator::from_word<int>(words[i][0]) == value) << i;
  return lanes;
}

// ---- arithmetic and atomics ----

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __log2f(float x) { return std::log2(x); }
inline float __int_as_float(int32_t bits) {
  return emulator::from_word<float>(emulator::to_word(bits));
}
inline int32_t __float_as_int(float x) {
  return emulator::from_word<int32_t>(emulator::to_word(x));
}
inline float __uint_as_float(uint32_t bits) {
  return emulator::from_word<float>(emulator::to_word(bits));
}
inline uint32_t __float_as_uint(float x) {
  return emulator::from_word<uint32_t>(emulator::to_word(x));
}
using std::isinf;
using std::isnan;
template <class A, class B>
constexpr auto min(A a, B b) {
  return std::min<std::common_type_t<A, B>>(a, b);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  return std::max<std::common_type_t<A, B>>(a, b);
}
template <class T>
T atomicAdd(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST);
}
template <class T>
T atomicOr(T* to, std::type_identity_t<T> value) {
  return __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST);
}

// ---- the runtime, as far as cuda/launch.h and cuda/tensor_map.cc know it ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}

enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed
};
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeProgrammaticStreamSerialization,
  cudaLaunchAttributeClusterDimension
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct {
      uint32_t x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  uint32_t numAttrs;
};
template <class... Formal, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Formal...),
                               const Actual&... args) {
  uint32_t cluster = 1;
  for (uint32_t i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension)
      cluster = config->attrs[i].val.clusterDim.x;
  if (config->blockDim.x % 32 != 0 || config->dynamicSmemBytes > emulator::kMostSharedBytes ||
      cluster > emulator::kMostClusterCtas || config->gridDim.x % cluster != 0)
    return cudaErrorInvalidValue;
  emulator::run_grid(config->gridDim, cluster, config->blockDim.x, config->dynamicSmemBytes,
                     [&] { kernel(args...); });
  return cudaSuccess;
}

using cudaDriverEntryPointQueryResult = cudaError_t;
inline constexpr cudaError_t cudaDriverEntryPointSuccess = cudaSuccess;
inline constexpr int cudaEnableDefault = 0;
/// Of the one entry point that there is: cuTensorMapEncodeTiled.
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version,
                                             int flags, cudaDriverEntryPointQueryResult* result);
