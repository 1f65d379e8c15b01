#include "cuda/sm90/kl/family.h"

#include <climits>

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/walk/tasks.h"

namespace msa::cuda::sm90::kl {
namespace {

/// The keys and the places of partial results must be as many as can be counted. Over all visible
/// tokens, blocks matter to shards alone.
template <class Params>
Refusal takes_blocks(const Plan& plan, const Params& a) {
  const Problem& p = plan.problem;
  if (!walk::has_room(plan.limits, a.k_idx.shape[0], a.batch.cu_seqlens_q.shape[0] - 1))
    return {"k_idx", nullptr, a.k_idx.shape[0], "up to max_tokens and max_seqlen_k rows"};
  if (a.q_idx.shape[0] * a.q_idx.shape[1] * kMostSlots > INT_MAX)
    return {"q_idx", nullptr, a.q_idx.shape[0], "T * Hi up to 2^27"};
  if (a.block_ids.given() && !fits_lists(p))
    return {"block_ids", "other lists", 0, "up to 16 blocks of 128"};
  if (!a.block_ids.given() && p.block_size != kBlock && a.batch.block_offset.given())
    return {"block_offset", "blocks of other sizes", 0, "blocks of 128"};
  return {};
}

}  // namespace

Refusal fits(const Problem& p, const Limits&) {
  if (p.op == Op::kIndexLse) return rows_fit(p, /*head=*/false, /*index=*/true);
  if (const Refusal refusal = rows_fit(p, /*head=*/true, /*index=*/true)) return refusal;
  return group_fits(p);
}

bool fits_lists(const Problem& p) { return p.block_size == kBlock && p.topk <= kMostSlots; }

Refusal takes(const Plan& plan, const IndexLseParams& a) {
  if (const Refusal refusal = all_aligned({{"q_idx", &a.q_idx}, {"k_idx", &a.k_idx}}))
    return refusal;
  return takes_blocks(plan, a);
}

Refusal takes(const Plan& plan, const KlParams& a) {
  if (const Refusal refusal = scale_fits(a.softmax_scale)) return refusal;
  if (const Refusal refusal = all_aligned({{"q", &a.q},
                                           {"k", &a.k},
                                           {"q_idx", &a.q_idx},
                                           {"k_idx", &a.k_idx},
                                           {"dq_idx", &a.dq_idx},
                                           {"dk_idx", &a.dk_idx}}))
    return refusal;
  return takes_blocks(plan, a);
}

}  // namespace msa::cuda::sm90::kl
