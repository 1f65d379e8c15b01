#include "cuda/sm90/index/family.h"

#include <bit>

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/index/config.h"

namespace msa::cuda::sm90::index {
namespace {

template <class Params>
Refusal takes_scores(const Params& a) {
  if (!a.batch.causal) return {"causal", "false", 0, "true"};
  return all_aligned({{"q_idx", &a.q_idx}, {"k_idx", &a.k_idx}});
}

}  // namespace

Refusal fits(const Problem& p, const Limits&) {
  if (p.op == Op::kSelectBlocks) {
    if (p.topk > kMaxSelect) return {"topk", nullptr, p.topk, "1..32"};
    return {};
  }
  if (const Refusal refusal = rows_fit(p, /*head=*/false, /*index=*/true)) return refusal;
  if (p.block_size != kBlock) return {"block_size", nullptr, p.block_size, "128"};
  if (!std::has_single_bit(static_cast<uint32_t>(p.heads_kv)) || p.heads_kv > NarrowTile::kRows)
    return {"heads_kv", nullptr, p.heads_kv, "powers of two up to 64"};
  if (p.op == Op::kIndexSelect && p.topk > kList) return {"topk", nullptr, p.topk, "1..16"};
  return {};
}

Refusal takes(const Plan&, const IndexScoresParams& a) { return takes_scores(a); }
Refusal takes(const Plan&, const IndexSelectParams& a) { return takes_scores(a); }
Refusal takes(const Plan&, const SelectBlocksParams&) { return {}; }

}  // namespace msa::cuda::sm90::index
