// The driver's encoder of tensor maps, with the demands that it documents, and the one device.
#include <cuda.h>
#include <cuda_runtime.h>

#include "cuda/device.h"

CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank, void* data,
                                const cuuint64_t* extents, const cuuint64_t* outer_strides,
                                const cuuint32_t* box, const cuuint32_t* steps,
                                CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion,
                                CUtensorMapFloatOOBfill) {
  if (rank != 4 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  if (box[0] * 2 != 128) return CUDA_ERROR_INVALID_VALUE;  // a row of the swizzle
  map->data = static_cast<const unsigned char*>(data);
  for (int i = 0; i < 4; ++i) {
    const uint64_t stride = i == 0 ? 2 : outer_strides[i - 1];
    if (extents[i] == 0 || box[i] == 0 || box[i] > 256 || steps[i] != 1)
      return CUDA_ERROR_INVALID_VALUE;
    if (i > 0 && stride % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    map->extent[i] = static_cast<int64_t>(extents[i]);
    map->stride[i] = static_cast<int64_t>(stride);
    map->box[i] = static_cast<int32_t>(box[i]);
  }
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** entry, unsigned, int,
                                             cudaDriverEntryPointQueryResult* result) {
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  return *result = cudaSuccess;
}

namespace msa::cuda {

Status device_info(int, const DeviceInfo** out) {
  static const DeviceInfo device{.name = "emulator",
                                 .capability = kHopper,
                                 .sms = emulator::kSMs,
                                 .shared_bytes = emulator::kMostSharedBytes,
                                 .l2_bytes = 0};
  *out = &device;
  return {};
}

DeviceScope::DeviceScope(int id) : id_(id) {}
DeviceScope::~DeviceScope() = default;

}  // namespace msa::cuda
