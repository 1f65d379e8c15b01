#include "cuda/device.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <vector>

#include "core/text.h"
#include "cuda/launch.h"

namespace msa::cuda {
namespace {

struct Devices {
  Status status{};                  ///< why there is none to use
  std::vector<DeviceInfo> infos{};  ///< by id
};

std::string version_text(int version) {
  return text("CUDA ", version / 1000, ".", version % 1000 / 10);
}

/// In words, what a failed cudaGetDeviceCount means.
Status why_no_device(cudaError_t result) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  if (driver == 0) return error(StatusCode::kUnavailable, "no device: no NVIDIA driver is loaded");
  if (driver < CUDART_VERSION && result == cudaErrorInsufficientDriver)
    return error(StatusCode::kUnavailable, "no device: the NVIDIA driver serves ",
                 version_text(driver), ", this build needs ", version_text(CUDART_VERSION));
  return error(StatusCode::kUnavailable, "no device: ", cudaGetErrorString(result));
}

Status too_old(const DeviceInfo& device) {
  return error(StatusCode::kUnavailable, "no device: ", device.name, " has compute capability ",
               device.capability / 10, ".", device.capability % 10, ", needed is ",
               kLeastCapability / 10, ".", kLeastCapability % 10, " or newer");
}

Devices find_devices() {
  int count = 0;
  if (const cudaError_t result = cudaGetDeviceCount(&count); result != cudaSuccess)
    return {.status = why_no_device(result)};
  if (count == 0) return {.status = error(StatusCode::kUnavailable, "no device")};
  Devices devices;
  for (int id = 0; id < count; ++id) {
    cudaDeviceProp properties{};
    if (const cudaError_t result = cudaGetDeviceProperties(&properties, id); result != cudaSuccess)
      return {.status =
                  error(StatusCode::kUnavailable, "device ", id, ": ", cudaGetErrorString(result))};
    devices.infos.push_back({.name = properties.name,
                             .capability = 10 * properties.major + properties.minor,
                             .sms = properties.multiProcessorCount,
                             .shared_bytes = static_cast<int>(properties.sharedMemPerBlockOptin),
                             .l2_bytes = properties.l2CacheSize});
  }
  const auto usable = [](const DeviceInfo& d) { return d.capability >= kLeastCapability; };
  if (std::none_of(devices.infos.begin(), devices.infos.end(), usable))
    devices.status = too_old(devices.infos[0]);
  return devices;
}

const Devices& devices() {
  static const Devices found = find_devices();
  return found;
}

}  // namespace

Status usable_device() { return devices().status; }

Status device_info(int id, const DeviceInfo** out) {
  MSA_TRY(usable_device());
  const std::vector<DeviceInfo>& all = devices().infos;
  if (id < 0 || id >= static_cast<int>(all.size()))
    return error(StatusCode::kUnavailable, "device: got CUDA device ", id, ", this machine has ",
                 all.size());
  *out = &all[static_cast<size_t>(id)];
  return (*out)->capability < kLeastCapability ? too_old(**out) : Status();
}

DeviceScope::DeviceScope(int id) : id_(id) {
  status_ = check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
  if (status_.ok() && before_ != id_) status_ = check_cuda(cudaSetDevice(id_), "cudaSetDevice");
}

DeviceScope::~DeviceScope() {
  if (status_.ok() && before_ != id_) cudaSetDevice(before_);
}

}  // namespace msa::cuda
