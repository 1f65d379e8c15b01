// Probabilities P = exp(logit - lse) by a given LSE, at any size: msa/ops.h says what P is where an
// f32 no longer tells the LSE from the logits next to it.
#pragma once

#include <cmath>

namespace msa::cuda {

/// From here on logits within kSlack of the LSE, as a part of it, count as equal to it: P = 1.
inline constexpr float kHugeLse = 1 << 24;
inline constexpr float kSlack = 1.0F / (1 << 21);

__device__ inline bool is_huge(float lse) { return fabsf(lse) >= kHugeLse && !isinf(lse); }

/// What is subtracted from a logit. Where the LSE is huge, the difference must be cut at 0.
__device__ inline float less_slack(float lse) {
  return is_huge(lse) ? fmaf(fabsf(lse), -kSlack, lse) : lse;
}

/// ln P of a product q . k.
__device__ inline float log_probability(float product, float scale, float lse) {
  const float x = fmaf(product, scale, -less_slack(lse));
  return is_huge(lse) && x > 0 ? 0 : x;
}

}  // namespace msa::cuda
