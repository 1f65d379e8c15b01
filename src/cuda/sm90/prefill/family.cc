#include "cuda/sm90/prefill/family.h"

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/prefill/config.h"

namespace msa::cuda::sm90::prefill {

Refusal fits(const Problem& p, const Limits& limits) {
  if (const Refusal refusal = rows_fit(p, /*head=*/true, /*index=*/false)) return refusal;
  if (const Refusal refusal = group_fits(p)) return refusal;
  if (p.block_size != kBlock) return {"block_size", nullptr, p.block_size, "128"};
  if (p.topk > kMostSlots) return {"topk", nullptr, p.topk, "1..16"};
  return prefill_fits(p, limits);
}

Refusal takes(const Plan&, const SparseAttentionParams& a) {
  if (const Refusal refusal = scale_fits(a.softmax_scale)) return refusal;
  return all_aligned({{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"o", &a.o}});
}

}  // namespace msa::cuda::sm90::prefill
