// Timing work on a CUDA device: calls are captured in a graph, whose replays are timed by events.
// In a build without CUDA every function says so.
#pragma once

#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "msa/status.h"

namespace msa::cli {

class CudaTimer {
 public:
  /// Errors: kUnavailable without a usable device.
  static Status create(std::unique_ptr<CudaTimer>* out);
  virtual ~CudaTimer() = default;

  /// For Queue::cuda_stream. Not the default stream.
  virtual void* stream() const = 0;
  /// Returns when everything enqueued is done.
  virtual Status wait() = 0;
  /// Records what enqueue() enqueues; *replay then runs it, waits, and tells the device's seconds.
  virtual Status capture(const std::function<Status()>& enqueue,
                         std::function<Status(double* seconds)>* replay) = 0;

  virtual double peak_flops() = 0;  ///< measured; see cuda/ceiling.h
  virtual double read_bandwidth() = 0;
  virtual int64_t l2_bytes() const = 0;
  virtual int64_t free_bytes() const = 0;
  /// {gpu, gpu_driver, gpu_memory_gib}
  virtual nlohmann::ordered_json machine() const = 0;
};

}  // namespace msa::cli
