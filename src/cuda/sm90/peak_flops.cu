#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <vector>

#include "cuda/ceiling.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda {
namespace {

constexpr int kRounds = 4096, kWarpgroups = 2;
constexpr int kM = 64, kN = 256, kK = 64;

struct Shared {
  SharedTile<kM, kK> a[kWarpgroups];
  SharedTile<kN, kK> b;
};

/// Products of random tiles that never leave the SM: 64 x 256 x 64 per round and warpgroup.
__global__ void __launch_bounds__(128 * kWarpgroups, 1) multiply_kernel(float* out) {
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared);
  // Sums of uniform numbers are nearly normal: operands without structure cost full power.
  auto* elements = reinterpret_cast<__nv_bfloat16*>(ptx::dynamic_shared);
  uint32_t state = threadIdx.x * 2654435761u + blockIdx.x;
  for (uint32_t i = threadIdx.x; i < sizeof(Shared) / 2; i += blockDim.x) {
    float sum = -2;
    for (int part = 0; part < 4; ++part) {
      state = state * 1664525u + 1013904223u;
      sum += static_cast<float>(state >> 8) * 0x1p-24f;
    }
    elements[i] = __float2bfloat16(sum);
  }
  ptx::fence_async_proxy();
  __syncthreads();
  const SharedTile<kM, kK>& a = shared.a[threadIdx.x / 128];
  float d[128];
  for (float& x : d) x = 0;
  for (int round = 0; round < kRounds; ++round) {
    ptx::wgmma_fence();
    for (int step = 0; step < kK / 16; ++step)
      ptx::wgmma(d, a.k_major(0, step), shared.b.k_major(0, step), true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }
  float sum = 0;
  for (float x : d) sum += x;
  if (sum == 12345.0f) *out = sum;  // nearly never, but the products must happen
}

}  // namespace

double peak_flops(int id) {
  const DeviceInfo* device = nullptr;
  if (!device_info(id, &device) || device->capability != kHopper) return 0;
  const DeviceScope scope(id);
  float* out = nullptr;
  if (!scope.status() || cudaMalloc(&out, sizeof(float)) != cudaSuccess) return 0;
  const LaunchShape shape{.grid = dim3(static_cast<uint32_t>(device->sms)),
                          .block = dim3(128 * kWarpgroups),
                          .shared_bytes = sizeof(Shared)};
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  const double flops = 2.0 * kM * kN * kK * kRounds * kWarpgroups * device->sms;
  std::vector<double> rates;
  for (int round = 0; round < 21; ++round) {
    cudaEventRecord(begin);
    const Status status = launch("peak", multiply_kernel, shape, nullptr, out);
    cudaEventRecord(end);
    float ms = 0;
    if (status.ok() && cudaEventSynchronize(end) == cudaSuccess)
      cudaEventElapsedTime(&ms, begin, end);
    if (ms > 0) rates.push_back(flops / (ms * 1e-3));
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  cudaFree(out);
  if (rates.empty()) return 0;
  const auto middle = rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

}  // namespace msa::cuda
