// The readable specification as a backend, in fp32 and in fp64.
#include <algorithm>
#include <thread>
#include <type_traits>
#include <vector>

#include "core/layer.h"
#include "core/registry.h"
#include "core/text.h"
#include "reference/attention.h"
#include "reference/cache.h"
#include "reference/index.h"
#include "reference/training.h"

namespace msa {
namespace {

/// What one worker needs for one query or key: a score and an id per block, a logit per token and
/// D sums, or the sums of a gradient row; a multiple of a cache line.
template <class Real>
int64_t scratch_bytes(const Problem& p, const Limits& limits) {
  int64_t bytes = 0;
  if (p.op == Op::kSelectBlocks || p.op == Op::kIndexSelect)
    bytes = (limits.max_seqlen_k + p.block_size - 1) / p.block_size * 8;
  if (p.op == Op::kSparseAttention || p.op == Op::kDenseAttention)
    bytes = (limits.max_seqlen_k + p.head_dim) * int64_t{sizeof(Real)};
  if (p.op == Op::kSparseAttentionBackward || p.op == Op::kDenseAttentionBackward)
    bytes = int64_t{2} * p.head_dim * int64_t{sizeof(Real)};
  if (p.op == Op::kKlBackward || p.op == Op::kKlLoss) bytes = p.index_dim * int64_t{sizeof(Real)};
  return (bytes + 63) / 64 * 64;
}

template <class Real>
int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  const unsigned all = std::max(1u, std::thread::hardware_concurrency());
  const int64_t workers = limits.max_threads > 0 ? limits.max_threads : all;
  return workers * scratch_bytes<Real>(problem, limits);
}

template <class Real, class Params>
Status run(const Plan& plan, const Params& params, Workspace workspace, Queue queue) {
  // The queue's threads if the plan has scratch for each of them, else the calling one alone.
  const int64_t each = scratch_bytes<Real>(plan.problem, plan.limits);
  const bool fits = queue.threads != nullptr &&
                    (each == 0 || queue.threads->count() * each <= plan.workspace_bytes);
  const reference::Team team{fits ? queue.threads : nullptr,
                             static_cast<std::byte*>(workspace.data), each};
  reference::compute<Real>(plan.problem, params, team);
  return {};
}

template <class Real>
std::vector<Kernel> kernels(const char* name) {
  std::vector<Kernel> all;
  for_each_op([&]<class Params>(Op op) {
    if constexpr (!std::is_same_v<Params, LayerParams>)
      all.push_back({.op = op,
                     .name = name,
                     .workspace_bytes = workspace_bytes<Real>,
                     .run = run_typed<Params, run<Real, Params>>});
  });
  all.push_back(kLayerSteps);
  return all;
}

template <class Real>
const Backend* backend(const char* name, int priority) {
  static const std::vector<Kernel> all = kernels<Real>(name);
  static const Backend made{.name = name,
                            .requirement = "any CPU",
                            .priority = priority,
                            .device = DeviceKind::kCPU,
                            .usable = [] { return Status(); },
                            .kernels = all};
  return &made;
}

}  // namespace

const Backend* reference_backend() { return backend<float>("reference", 0); }
const Backend* reference_f64_backend() { return backend<double>("reference-f64", -1); }

}  // namespace msa
