#include "conformance/device.h"

#include "core/text.h"

#if MSA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace msa::conformance {

#if MSA_WITH_CUDA

namespace {

Status checked(cudaError_t result, const char* what, size_t bytes) {
  if (result == cudaSuccess) return {};
  return error(StatusCode::kInternal, what, " of ", bytes, " bytes: ", cudaGetErrorString(result));
}

}  // namespace

Status DeviceMemory::allocate(size_t bytes, DeviceMemory* out) {
  void* data = nullptr;
  MSA_TRY(checked(cudaMalloc(&data, bytes), "device allocation", bytes));
  out->data_.reset(data);
  return {};
}

void DeviceMemory::Release::operator()(void* data) const { cudaFree(data); }

Status upload(void* device, const void* host, size_t bytes) {
  return checked(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "upload", bytes);
}

Status download(void* host, const void* device, size_t bytes) {
  return checked(cudaMemcpy(host, device, bytes, cudaMemcpyDeviceToHost), "download", bytes);
}

Status copy_on_device(void* to, const void* from, size_t bytes) {
  return checked(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToDevice), "copy on the device",
                 bytes);
}

#else

namespace {

Status no_cuda() { return error(StatusCode::kUnavailable, "this build has no CUDA backend"); }

}  // namespace

Status DeviceMemory::allocate(size_t, DeviceMemory*) { return no_cuda(); }
void DeviceMemory::Release::operator()(void*) const {}
Status upload(void*, const void*, size_t) { return no_cuda(); }
Status download(void*, const void*, size_t) { return no_cuda(); }
Status copy_on_device(void*, const void*, size_t) { return no_cuda(); }

#endif

Status DeviceCopies::make(std::span<const HostRange> host, DeviceCopies* out) {
  DeviceCopies copies;
  for (const HostRange& range : host) {
    if (range.empty()) continue;
    copies.host_.push_back(range);
    MSA_TRY(DeviceMemory::allocate(range.size(), &copies.device_.emplace_back()));
    MSA_TRY(upload(copies.device_.back().data(), range.data(), range.size()));
  }
  *out = std::move(copies);
  return {};
}

void* DeviceCopies::address(const void* host) const {
  const auto* at = static_cast<const std::byte*>(host);
  for (size_t i = 0; i < host_.size(); ++i) {
    if (at >= host_[i].data() && at < host_[i].data() + host_[i].size())
      return static_cast<std::byte*>(device_[i].data()) + (at - host_[i].data());
  }
  return nullptr;
}

Status DeviceCopies::bring_back() const {
  for (size_t i = 0; i < host_.size(); ++i)
    MSA_TRY(download(host_[i].data(), device_[i].data(), host_[i].size()));
  return {};
}

}  // namespace msa::conformance
