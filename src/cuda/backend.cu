// The CUDA backend: finds out whether there is a device; its kernels are still to come.
#include <cuda_runtime_api.h>

#include "core/partial_backend.h"
#include "core/registry.h"
#include "core/text.h"

namespace msa {
namespace {

class CudaBackend final : public PartialBackend {
 public:
  const char* name() const override { return "cuda"; }
  const char* requirement() const override { return "an NVIDIA Hopper GPU and its driver"; }
  int priority() const override { return 100; }
  DeviceKind device() const override { return DeviceKind::kCUDA; }

  Status usable() const override {
    int count = 0;
    const cudaError_t result = cudaGetDeviceCount(&count);
    if (result != cudaSuccess)
      return error(StatusCode::kUnavailable, "no CUDA device: ", cudaGetErrorString(result));
    if (count == 0) return error(StatusCode::kUnavailable, "no CUDA device");
    return {};
  }

  Status supports(const Problem&) const override {
    return error(StatusCode::kUnsupported, "no CUDA kernels in this build yet");
  }

  int64_t workspace_bytes(const Problem&, const Limits&) const override { return 0; }
};

}  // namespace

const Backend* cuda_backend() {
  static const CudaBackend backend;
  return &backend;
}

}  // namespace msa
