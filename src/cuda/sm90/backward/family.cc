#include "cuda/sm90/backward/family.h"

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/walk/tasks.h"

namespace msa::cuda::sm90::backward {

Refusal fits(const Problem& p, const Limits&) {
  if (const Refusal refusal = rows_fit(p, /*head=*/true, /*index=*/false)) return refusal;
  if (const Refusal refusal = group_fits(p)) return refusal;
  if (p.op == Op::kDenseAttentionBackward) return {};
  if (p.block_size != kBlock) return {"block_size", nullptr, p.block_size, "128"};
  if (p.topk > kMostSlots) return {"topk", nullptr, p.topk, "1..16"};
  return {};
}

Refusal takes(const Plan& plan, const AttentionBackwardParams& a) {
  if (const Refusal refusal = all_aligned({{"q", &a.q},
                                           {"k", &a.k},
                                           {"v", &a.v},
                                           {"o", &a.o},
                                           {"d_o", &a.d_o},
                                           {"dq", &a.dq},
                                           {"dk", &a.dk},
                                           {"dv", &a.dv}}))
    return refusal;
  if (plan.problem.block_size != kBlock && a.batch.block_offset.given())
    return {"block_offset", "blocks of other sizes", 0, "blocks of 128"};
  if (a.d_o.dtype != DType::kBF16) return {"d_o", name_of(a.d_o.dtype), 0, "bf16"};
  if (a.q.shape[0] == 0) return {"q", "no row", 0, "one or more"};
  if (a.k.shape[0] == 0) return {"k", "no row", 0, "one or more"};
  if (!walk::has_room(plan.limits, a.k.shape[0], a.batch.cu_seqlens_q.shape[0] - 1))
    return {"k", nullptr, a.k.shape[0], "up to max_tokens and max_seqlen_k rows"};
  if (a.row_ptr.given() && a.row_ptr.shape[1] - 1 > walk::most_rows(plan.limits))
    return {"row_ptr", nullptr, a.row_ptr.shape[1], "a row per block of the limits"};
  return {};
}

}  // namespace msa::cuda::sm90::backward
