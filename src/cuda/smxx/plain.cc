#include "cuda/smxx/plain.h"

#include "core/text.h"

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
    case Op::kSparseDecode:
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

}  // namespace

Status supports(const Problem& problem, const DeviceInfo& device) {
  constexpr int32_t kMostHeads = 65535;  // of a grid's y
  if (problem.heads_q > kMostHeads)
    return error(StatusCode::kUnsupported, "heads_q: got ", problem.heads_q, ", supported up to ",
                 kMostHeads);
  const auto [field, dim, needed] = shared(problem);
  if (needed > device.shared_bytes)
    return error(StatusCode::kUnsupported, field, ": got ", dim, ", which takes ", needed,
                 " bytes of shared memory, ", device.name, " has ", device.shared_bytes);
  return {};
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

}  // namespace msa::cuda::plain
