// The GPUs of this machine, looked at once, and which of them a thread works on.
#pragma once

#include <cstdint>
#include <string>

#include "msa/status.h"

namespace msa::cuda {

/// What the choice of a kernel and of its grid depends on.
struct DeviceInfo {
  std::string name;
  int capability = 0;    ///< 10 * major + minor: 80 is an A100, 90 a Hopper
  int sms = 0;           ///< streaming multiprocessors
  int shared_bytes = 0;  ///< most shared memory of one CTA, opted in
  int64_t l2_bytes = 0;
};

inline constexpr int kLeastCapability = 80;
inline constexpr int kHopper = 90;

/// Ok when some device can run our kernels, else kUnavailable: no driver, or one too old; no
/// device, or one too old, by name. The first call asks CUDA, later ones remember.
Status usable_device();

/// *out = device `id`, which lives as long as the program. Errors: those of usable_device(), and of
/// this device alone.
Status device_info(int id, const DeviceInfo** out);

/// Makes `id` the calling thread's current device for as long as this lives.
class DeviceScope {
 public:
  explicit DeviceScope(int id);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  const Status& status() const { return status_; }

 private:
  int id_;
  int before_ = -1;
  Status status_;
};

}  // namespace msa::cuda
