// The CUDA backends. "cuda-plain" has the kernels of smxx/, which take any legal shape on any GPU
// from compute capability 8.0 on. "cuda" tries the tuned families of sm90/ first. "cuda-union" and
// "cuda-kv-outer" are "cuda" with one order of sparse prefill, whatever the lists.
#include <span>
#include <vector>

#include "core/registry.h"
#include "cuda/device.h"
#include "cuda/sm90/backward/family.h"
#include "cuda/sm90/decode/family.h"
#include "cuda/sm90/dense/family.h"
#include "cuda/sm90/index/family.h"
#include "cuda/sm90/kl/family.h"
#include "cuda/sm90/prefill/family.h"
#include "cuda/smxx/plain.h"

namespace msa {
namespace {

using namespace cuda::sm90;  // NOLINT(google-build-using-namespace)
using prefill::Order;

/// Of an operator, the faster ones first.
std::vector<Kernel> kernels(Order order) {
  std::vector<Kernel> all{prefill::kernel(order)};
  for (const std::span<const Kernel> family :
       {decode::kernels(), index::kernels(), dense::kernels(), backward::kernels(), kl::kernels(),
        cuda::plain::kernels()})
    all.insert(all.end(), family.begin(), family.end());
  return all;
}

Backend backend(const char* name, int priority, std::span<const Kernel> kernels) {
  return {.name = name,
          .requirement = "NVIDIA GPU of sm_80 or newer",
          .priority = priority,
          .device = DeviceKind::kCUDA,
          .usable = cuda::usable_device,
          .kernels = kernels};
}

template <Order kOrder>
const Backend* tuned_backend(const char* name, int priority) {
  static const std::vector<Kernel> all = kernels(kOrder);
  static const Backend made = backend(name, priority, all);
  return &made;
}

}  // namespace

const Backend* cuda_plain_backend() {
  static const Backend made = backend("cuda-plain", 90, cuda::plain::kernels());
  return &made;
}

const Backend* cuda_backend() { return tuned_backend<Order::kAuto>("cuda", 100); }
const Backend* cuda_union_backend() { return tuned_backend<Order::kUnion>("cuda-union", 80); }
const Backend* cuda_kv_outer_backend() {
  return tuned_backend<Order::kKvOuter>("cuda-kv-outer", 80);
}

}  // namespace msa
