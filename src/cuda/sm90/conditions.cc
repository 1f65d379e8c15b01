#include "cuda/sm90/conditions.h"

#include <cstddef>
#include <cstdint>

namespace msa::cuda {

bool aligned(const TensorView& view) {
  bool result = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (size_t i = 0; i + 1 < static_cast<size_t>(view.rank); ++i) {
    const int64_t stride = view.stride[i];
    result =
        result && (view.shape[i] <= 1 || (stride > 0 && stride * size_of(view.dtype) % 16 == 0));
  }
  return result;
}

namespace sm90 {

Refusal rows_fit(const Problem& p, bool head, bool index) {
  if (p.dtype != DType::kBF16) return {"dtype", name_of(p.dtype), 0, "bf16"};
  if (head && p.head_dim != 128) return {"head_dim", nullptr, p.head_dim, "128"};
  if (index && p.index_dim != 128) return {"index_dim", nullptr, p.index_dim, "128"};
  return {};
}

Refusal group_fits(const Problem& p) {
  if (p.group() == 8 || p.group() == 16) return {};
  return {"heads_q / heads_kv", nullptr, p.group(), "8 and 16"};
}

static_assert(kDecodeTokens == 16, "the texts below");

Refusal step_fits(const Limits& limits) {
  if (limits.max_seqlen_q <= kDecodeTokens) return {};
  return {"max_seqlen_q", nullptr, limits.max_seqlen_q, "1..16"};
}

Refusal prefill_fits(const Problem& p, const Limits& limits) {
  if (p.layout == KvLayout::kPacked || limits.max_seqlen_q > kDecodeTokens) return {};
  return {"max_seqlen_q", nullptr, limits.max_seqlen_q, "17 and more with paged keys"};
}

Refusal scale_fits(float softmax_scale) {
  if (softmax_scale >= 0) return {};
  return {"softmax_scale", "a negative one", 0, ">= 0"};
}

Refusal all_aligned(std::initializer_list<std::pair<const char*, const TensorView*>> views) {
  for (const auto& [name, view] : views)
    if (!aligned(*view))
      return {name, "rows that do not begin at multiples of 16 bytes", 0,
              "addresses and strides of 16 bytes"};
  return {};
}

}  // namespace sm90
}  // namespace msa::cuda
