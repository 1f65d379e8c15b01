// The CUDA backends. "cuda-plain" runs the kernels of smxx/, which take any legal shape on any GPU
// from compute capability 8.0 on. "cuda" is the same plus the tuned families of sm90/: each has a
// predicate and a launch function, and takes a call on a Hopper device when its predicate says so.
// "cuda-union" and "cuda-kv-outer" are "cuda" with one order of sparse prefill, whatever the lists.
#include <algorithm>
#include <cstdint>

#include "core/layer_decode.h"
#include "core/partial_backend.h"
#include "core/registry.h"
#include "core/text.h"
#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sm90/backward/launch.h"
#include "cuda/sm90/decode/launch.h"
#include "cuda/sm90/dense/launch.h"
#include "cuda/sm90/index/launch.h"
#include "cuda/sm90/kl/launch.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/smxx/plain.h"

namespace msa {
namespace {

using namespace cuda;  // NOLINT(google-build-using-namespace)

class PlainBackend : public PartialBackend {
 public:
  const char* name() const override { return "cuda-plain"; }
  const char* requirement() const override { return "NVIDIA GPU of sm_80 or newer"; }
  int priority() const override { return 90; }
  DeviceKind device() const override { return DeviceKind::kCUDA; }
  Status usable() const override { return usable_device(); }

  Status supports(const Problem& problem) const override {
    if (problem.device.kind != DeviceKind::kCUDA)
      return error(StatusCode::kUnsupported, "device: got CPU tensors, supported are CUDA ones");
    if (problem.op == Op::kLayerDecode) return supports_layer_decode(*this, problem);
    const DeviceInfo* device = nullptr;
    MSA_TRY(device_info(problem.device.id, &device));
    return plain::supports(problem, *device);
  }

  int64_t workspace_bytes(const Problem& problem, const Limits& limits) const override {
    if (problem.op == Op::kLayerDecode) return layer_decode_bytes(*this, problem, limits);
    return plain::workspace_bytes(problem, limits);
  }

  using Backend::run;
  Status run(const Plan& p, const IndexScoresParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const SelectBlocksParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const IndexSelectParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const SparseAttentionParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const DenseAttentionParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const MergeParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const BlockListsParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const AppendPagedParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const BlockMassParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const AttentionBackwardParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const IndexLseParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const KlParams& a, Workspace w, Queue q) const override {
    return on_device(p, w, q, [&](cudaStream_t stream) { return plain::run(p, a, w, stream); });
  }
  using PartialBackend::run;

 protected:
  /// launch(stream) with the problem's device as the current one.
  template <class Launch>
  static Status on_device(const Plan& plan, Workspace workspace, const Queue& queue,
                          const Launch& launch) {
    if (reinterpret_cast<uintptr_t>(workspace.data) % 256 != 0)
      return invalid("workspace: the address must be a multiple of 256 bytes on CUDA");
    const DeviceScope scope(plan.problem.device.id);
    MSA_TRY(scope.status());
    return launch(stream_of(queue));
  }
};

/// A tuned family F of sm90/ hooks in with three lines: in its operator's run()
///   if (tuned(p.problem, sm90::F::fits)) return on_device(p, w, q, [&](cudaStream_t stream) {
///     return sm90::F::run(p, a, w, stream); });
/// and in workspace_bytes() its own part.
class CudaBackend final : public PlainBackend {
 public:
  using Order = sm90::prefill::Order;
  CudaBackend(const char* name, int priority, Order order)
      : name_(name), priority_(priority), order_(order) {}

  const char* name() const override { return name_; }
  int priority() const override { return priority_; }

  int64_t workspace_bytes(const Problem& problem, const Limits& limits) const override {
    int64_t bytes = PlainBackend::workspace_bytes(problem, limits);
    if (tuned(problem, sm90::index::fits))
      bytes = std::max(bytes, sm90::index::workspace_bytes(problem, limits));
    if (tuned_index(problem, limits))
      bytes = std::max(bytes, sm90::decode::workspace_bytes(problem, limits));
    if (tuned(problem, sm90::dense::fits))
      bytes = std::max(bytes, sm90::dense::workspace_bytes(problem, limits));
    if (tuned(problem, sm90::prefill::fits))
      bytes = std::max(bytes, sm90::prefill::workspace_bytes(problem, limits, order_));
    if (tuned(problem, sm90::backward::fits))
      bytes = std::max(bytes, sm90::backward::workspace_bytes(problem, limits));
    if (tuned(problem, sm90::kl::fits))
      bytes = std::max(bytes, sm90::kl::workspace_bytes(problem, limits));
    return bytes;
  }

  Status run(const Plan& p, const IndexScoresParams& a, Workspace w, Queue q) const override {
    return run_index(p, a, w, q);
  }
  Status run(const Plan& p, const SelectBlocksParams& a, Workspace w, Queue q) const override {
    return run_index(p, a, w, q);
  }
  Status run(const Plan& p, const IndexSelectParams& a, Workspace w, Queue q) const override {
    if (tuned_index(p.problem, p.limits) && sm90::decode::fits(a))
      return on_device(p, w, q,
                       [&](cudaStream_t stream) { return sm90::decode::run(p, a, w, stream); });
    return run_index(p, a, w, q);
  }
  Status run(const Plan& p, const SparseAttentionParams& a, Workspace w, Queue q) const override {
    if (tuned(p.problem, sm90::decode::fits) && sm90::decode::fits(a))
      return on_device(p, w, q,
                       [&](cudaStream_t stream) { return sm90::decode::run(p, a, stream); });
    if (!tuned(p.problem, sm90::prefill::fits) || !sm90::prefill::fits(a))
      return PlainBackend::run(p, a, w, q);
    return on_device(
        p, w, q, [&](cudaStream_t stream) { return sm90::prefill::run(p, a, w, order_, stream); });
  }
  Status run(const Plan& p, const LayerDecodeParams& a, Workspace w, Queue q) const override {
    const LayerDecodeSteps s = layer_decode_steps(p, a, w);
    const bool joined = tuned_index(s.select_plan.problem, p.limits) &&
                        sm90::decode::fits(s.attend_plan.problem) && sm90::decode::fits(s.select) &&
                        sm90::decode::fits(s.attend);
    if (!joined) return PlainBackend::run(p, a, w, q);
    return on_device(p, w, q, [&](cudaStream_t stream) {
      return sm90::decode::run_layer(s.select_plan, s.select, s.attend_plan, s.attend, s.workspace,
                                     stream);
    });
  }
  Status run(const Plan& p, const DenseAttentionParams& a, Workspace w, Queue q) const override {
    if (!tuned(p.problem, sm90::dense::fits) || !sm90::dense::fits(a, p))
      return PlainBackend::run(p, a, w, q);
    return on_device(p, w, q,
                     [&](cudaStream_t stream) { return sm90::dense::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const AttentionBackwardParams& a, Workspace w, Queue q) const override {
    if (!tuned(p.problem, sm90::backward::fits) || !sm90::backward::fits(a, p))
      return PlainBackend::run(p, a, w, q);
    return on_device(p, w, q,
                     [&](cudaStream_t stream) { return sm90::backward::run(p, a, w, stream); });
  }
  Status run(const Plan& p, const IndexLseParams& a, Workspace w, Queue q) const override {
    return run_index_training(p, a, w, q);
  }
  Status run(const Plan& p, const KlParams& a, Workspace w, Queue q) const override {
    return run_index_training(p, a, w, q);
  }
  using PlainBackend::run;

 private:
  static bool tuned(const Problem& problem, bool (*fits)(const Problem&)) {
    const DeviceInfo* device = nullptr;
    return device_info(problem.device.id, &device).ok() && device->capability == kHopper &&
           fits(problem);
  }
  /// Few new tokens: scores at the speed of memory, then the choice.
  static bool tuned_index(const Problem& problem, const Limits& limits) {
    return sm90::decode::fits_index(problem, limits) &&
           tuned(problem, [](const Problem&) { return true; });
  }
  template <class Params>
  Status run_index(const Plan& p, const Params& a, Workspace w, Queue q) const {
    if (!tuned(p.problem, sm90::index::fits) || !sm90::index::fits(a))
      return PlainBackend::run(p, a, w, q);
    return on_device(p, w, q,
                     [&](cudaStream_t stream) { return sm90::index::run(p, a, w, stream); });
  }
  template <class Params>
  Status run_index_training(const Plan& p, const Params& a, Workspace w, Queue q) const {
    if (!tuned(p.problem, sm90::kl::fits) || !sm90::kl::fits(a, p))
      return PlainBackend::run(p, a, w, q);
    return on_device(p, w, q, [&](cudaStream_t stream) { return sm90::kl::run(p, a, w, stream); });
  }

  const char* name_;
  int priority_;
  Order order_;  ///< of sparse prefill
};

}  // namespace

const Backend* cuda_plain_backend() {
  static const PlainBackend backend;
  return &backend;
}

const Backend* cuda_backend() {
  static const CudaBackend backend("cuda", 100, CudaBackend::Order::kAuto);
  return &backend;
}

const Backend* cuda_union_backend() {
  static const CudaBackend backend("cuda-union", 80, CudaBackend::Order::kUnion);
  return &backend;
}

const Backend* cuda_kv_outer_backend() {
  static const CudaBackend backend("cuda-kv-outer", 80, CudaBackend::Order::kKvOuter);
  return &backend;
}

}  // namespace msa
