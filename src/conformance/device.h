// What the host does around a call on a CUDA device. In a build without CUDA every function says
// so.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "msa/status.h"

namespace msa::conformance {

/// Device memory of exactly `bytes` bytes, so that sanitizers see its ends.
class DeviceMemory {
 public:
  static Status allocate(size_t bytes, DeviceMemory* out);
  void* data() const { return data_.get(); }

 private:
  struct Release {
    void operator()(void* data) const;
  };
  std::unique_ptr<void, Release> data_;
};

// Complete on return, and so is everything that was enqueued before; kInternal with what failed.
Status upload(void* device, const void* host, size_t bytes);
Status download(void* host, const void* device, size_t bytes);
Status copy_on_device(void* to, const void* from, size_t bytes);

using HostRange = std::span<std::byte>;

/// Copies of host memory on the device.
class DeviceCopies {
 public:
  static Status make(std::span<const HostRange> host, DeviceCopies* out);
  /// Where a byte of one of the ranges lies; null for one of none.
  void* address(const void* host) const;
  /// Copies everything back to where it came from.
  Status bring_back() const;

 private:
  std::vector<HostRange> host_;
  std::vector<DeviceMemory> device_;
};

}  // namespace msa::conformance
