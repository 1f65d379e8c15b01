#include "cuda/sm90/decode/family.h"

#include "cuda/sm90/conditions.h"
#include "cuda/sm90/decode/config.h"

namespace msa::cuda::sm90::decode {
namespace {

Refusal cache_fits(const Problem& p) {
  if (p.layout != KvLayout::kPaged) return {"layout", "packed keys", 0, "paged ones"};
  if (p.block_size != kBlock) return {"block_size", nullptr, p.block_size, "128"};
  return {};
}

}  // namespace

Refusal fits(const Problem& p, const Limits& limits) {
  if (const Refusal refusal = rows_fit(p, /*head=*/true, /*index=*/false)) return refusal;
  if (const Refusal refusal = cache_fits(p)) return refusal;
  if (p.group() > kRows) return {"heads_q / heads_kv", nullptr, p.group(), "1..16"};
  if (p.topk > kMaxList) return {"topk", nullptr, p.topk, "1..32"};
  return step_fits(limits);
}

Refusal fits_index(const Problem& p, const Limits& limits) {
  if (const Refusal refusal = rows_fit(p, /*head=*/false, /*index=*/true)) return refusal;
  if (const Refusal refusal = cache_fits(p)) return refusal;
  // More rows than one mma has would read the keys again: 192 us against 71 of the index family at
  // 8 x 128K with 16 new tokens.
  if (limits.max_seqlen_q * p.heads_kv > kRows)
    return {"max_seqlen_q * heads_kv", nullptr, limits.max_seqlen_q * p.heads_kv, "1..16"};
  if (p.topk > kMaxChosen) return {"topk", nullptr, p.topk, "1..16"};
  if (limits.max_batch > kMaxSequences) return {"max_batch", nullptr, limits.max_batch, "1..1024"};
  if (limits.max_seqlen_k > int64_t{kMaxBlocks} * kBlock)
    return {"max_seqlen_k", nullptr, limits.max_seqlen_k, "up to 2^20"};
  return {};
}

Refusal fits_layer(const Problem& p, const Limits& limits) {
  if (const Refusal refusal = fits_index(p, limits)) return refusal;
  return fits(p, limits);
}

Refusal takes(const Plan&, const SparseAttentionParams& a) {
  if (const Refusal refusal = scale_fits(a.softmax_scale)) return refusal;
  return all_aligned({{"q", &a.q}, {"k", &a.k}, {"v", &a.v}, {"o", &a.o}});
}

Refusal takes(const Plan&, const IndexSelectParams& a) {
  return all_aligned({{"q_idx", &a.q_idx}, {"k_idx", &a.k_idx}});
}

Refusal takes(const Plan&, const LayerParams& a) {
  if (const Refusal refusal = scale_fits(a.softmax_scale)) return refusal;
  return all_aligned({{"q", &a.q},
                      {"q_idx", &a.q_idx},
                      {"k", &a.k},
                      {"v", &a.v},
                      {"k_idx", &a.k_idx},
                      {"o", &a.o}});
}

}  // namespace msa::cuda::sm90::decode
