#include "msa/cuda_timer.h"

#include "core/text.h"

#if MSA_WITH_CUDA

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cmath>

#include "cuda/ceiling.h"
#include "cuda/device.h"

namespace msa::cli {
namespace {

Status checked(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return {};
  return error(StatusCode::kInternal, what, ": ", cudaGetErrorString(result));
}

/// A graph and the events around it.
struct Recording {
  cudaGraphExec_t graph = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;

  ~Recording() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
    if (begin != nullptr) cudaEventDestroy(begin);
    if (end != nullptr) cudaEventDestroy(end);
  }
};

class Timer final : public CudaTimer {
 public:
  explicit Timer(const cuda::DeviceInfo& device) : device_(device) {}
  ~Timer() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Status open() {
    return checked(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "stream");
  }

  void* stream() const override { return stream_; }
  Status wait() override { return checked(cudaStreamSynchronize(stream_), "the device"); }

  Status capture(const std::function<Status()>& enqueue,
                 std::function<Status(double*)>* replay) override {
    auto recording = std::make_shared<Recording>();
    MSA_TRY(checked(cudaEventCreate(&recording->begin), "event"));
    MSA_TRY(checked(cudaEventCreate(&recording->end), "event"));
    cudaGraph_t graph = nullptr;
    MSA_TRY(checked(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture"));
    const Status enqueued = enqueue();
    const Status captured = checked(cudaStreamEndCapture(stream_, &graph), "capture");
    MSA_TRY(enqueued);
    MSA_TRY(captured);
    const Status made = checked(cudaGraphInstantiate(&recording->graph, graph, 0), "graph");
    cudaGraphDestroy(graph);
    MSA_TRY(made);
    *replay = [recording, stream = stream_](double* seconds) -> Status {
      MSA_TRY(checked(cudaEventRecord(recording->begin, stream), "event"));
      MSA_TRY(checked(cudaGraphLaunch(recording->graph, stream), "graph"));
      MSA_TRY(checked(cudaEventRecord(recording->end, stream), "event"));
      MSA_TRY(checked(cudaEventSynchronize(recording->end), "the device"));
      float ms = 0;
      MSA_TRY(checked(cudaEventElapsedTime(&ms, recording->begin, recording->end), "event"));
      *seconds = ms * 1e-3;
      return {};
    };
    return {};
  }

  double peak_flops() override { return cuda::peak_flops(0); }
  double read_bandwidth() override { return cuda::read_bandwidth(0); }
  int64_t l2_bytes() const override { return device_.l2_bytes; }
  int64_t free_bytes() const override {
    size_t free = 0, total = 0;
    return cudaMemGetInfo(&free, &total) == cudaSuccess ? static_cast<int64_t>(free) : 0;
  }
  nlohmann::ordered_json machine() const override {
    int driver = 0;
    size_t free = 0, total = 0;
    cudaDriverGetVersion(&driver);
    cudaMemGetInfo(&free, &total);
    return {{"gpu", device_.name},
            {"gpu_memory_gib", std::round(static_cast<double>(total) / (1 << 30) * 10) / 10},
            {"cuda_driver", fmt::format("{}.{}", driver / 1000, driver % 1000 / 10)}};
  }

 private:
  const cuda::DeviceInfo& device_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace

Status CudaTimer::create(std::unique_ptr<CudaTimer>* out) {
  const cuda::DeviceInfo* device = nullptr;
  MSA_TRY(cuda::device_info(0, &device));
  auto timer = std::make_unique<Timer>(*device);
  MSA_TRY(timer->open());
  *out = std::move(timer);
  return {};
}

}  // namespace msa::cli

#else

namespace msa::cli {

Status CudaTimer::create(std::unique_ptr<CudaTimer>*) {
  return error(StatusCode::kUnavailable, "this build has no CUDA backend");
}

}  // namespace msa::cli

#endif
