// Softmax in powers of two: exp(x) is exp2(x log2(e)).
#pragma once

#include <cmath>

namespace msa::cuda {

inline constexpr float kLog2E = 1.44269504088896340736F;
inline constexpr float kLn2 = 0.693147180559945309F;

/// What a call multiplies logits of `dim` columns with: `given`, or where that is 0 the default.
inline float softmax_scale(float given, int dim) {
  return given != 0 ? given : 1 / std::sqrt(static_cast<float>(dim));
}

}  // namespace msa::cuda
