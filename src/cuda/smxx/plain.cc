#include "cuda/smxx/plain.h"

#include <type_traits>
#include <vector>

#include "core/layer.h"
#include "core/registry.h"
#include "cuda/device.h"
#include "cuda/kernel.h"

namespace msa::cuda::plain {
namespace {

/// Shared memory of a CTA, and the dimension that it grows with.
struct Shared {
  const char* field;
  int32_t dim;
  int64_t bytes;
};

Shared shared(const Problem& p) {
  switch (p.op) {
    case Op::kIndexScores:
    case Op::kIndexSelect: {
      Problem rows = p;
      rows.head_dim = p.index_dim, rows.heads_q = p.heads_kv, rows.heads_kv = 1;
      return {"index_dim", p.index_dim, attention_shared_bytes(rows)};
    }
    case Op::kSparseAttention:
    case Op::kDenseAttention:
    case Op::kBlockMass:
      return {"head_dim", p.head_dim, attention_shared_bytes(p)};
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
      return {"head_dim", p.head_dim, attention_backward_shared_bytes(p)};
    case Op::kIndexLse:
      return {"index_dim", p.index_dim, index_lse_shared_bytes(p)};
    case Op::kKlBackward:
    case Op::kKlLoss:
      if (p.index_dim > p.head_dim) return {"index_dim", p.index_dim, kl_shared_bytes(p)};
      return {"head_dim", p.head_dim, kl_shared_bytes(p)};
    default:
      return {"head_dim", p.head_dim, 0};
  }
}

Refusal fits(const Problem& problem, const Limits&) {
  constexpr int32_t kMostHeads = 65535;  // of a grid's y
  if (problem.heads_q > kMostHeads) return {"heads_q", nullptr, problem.heads_q, "1..65535"};
  const DeviceInfo* device = nullptr;
  if (!device_info(problem.device.id, &device).ok())
    return {"device", nullptr, problem.device.id, "those of nvidia-smi"};
  const auto [field, dim, needed] = shared(problem);
  if (needed <= device->shared_bytes) return {};
  return {field, nullptr, dim, "rows that fit into the shared memory of a CTA"};
}

int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  switch (problem.op) {
    case Op::kIndexSelect:
      return index_select_bytes(problem, limits);
    case Op::kBlockLists:
      return block_lists_bytes(problem, limits);
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
      return attention_backward_bytes(problem, limits);
    case Op::kKlBackward:
      return kl_bytes(problem, limits);
    default:
      return 0;
  }
}

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> all;
  for_each_op([&]<class Params>(Op op) {
    if constexpr (!std::is_same_v<Params, LayerParams>)
      all.push_back({.op = op,
                     .name = "plain",
                     .fits = fits,
                     .workspace_bytes = workspace_bytes,
                     .run = run_on_device<Params, run<Params>>});
  });
  all.push_back(kLayerSteps);
  return all;
}

}  // namespace

std::span<const Kernel> kernels() {
  static const std::vector<Kernel> all = all_kernels();
  return all;
}

}  // namespace msa::cuda::plain
