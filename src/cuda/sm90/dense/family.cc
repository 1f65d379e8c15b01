#include "cuda/sm90/dense/family.h"

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/dense/shape.h"

namespace msa::cuda::sm90::dense {

Refusal fits(const Problem& p, const Limits&) {
  if (const Refusal refusal = rows_fit(p, /*head=*/true, /*index=*/false)) return refusal;
  if (p.group() > kTileRows) return {"heads_q / heads_kv", nullptr, p.group(), "1..64"};
  if (p.block_size != kBlock && p.layout == KvLayout::kPaged)
    return {"block_size", nullptr, p.block_size, "128 with paged keys"};
  return {};
}

Refusal takes(const Plan& plan, const DenseAttentionParams& a) {
  if (const Refusal refusal = scale_fits(a.softmax_scale)) return refusal;
  if (const Refusal refusal = all_aligned({{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"o", &a.o}}))
    return refusal;
  if (plan.problem.block_size == kBlock) return {};
  if (a.block_max.given()) return {"block_max", "blocks of other sizes", 0, "blocks of 128"};
  if (a.batch.block_offset.given())
    return {"block_offset", "blocks of other sizes", 0, "blocks of 128"};
  return {};
}

}  // namespace msa::cuda::sm90::dense
