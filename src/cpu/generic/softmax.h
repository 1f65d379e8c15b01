// What turns products into weights and probabilities, for logits of any size.
#pragma once

#include <bit>
#include <cmath>

#include "cpu/generic/tile.h"

namespace msa::cpu {

inline constexpr float kLog2E = 1.44269504f, kLn2 = 0.69314718f;

/// What makes exponents of the products s of a row whose largest is `max`: s * factor + shift. The
/// shift is rounded, and all weights of the row err by the same power of two, up to 2^32 where
/// max * c is 2^30. From there on, where two products lie 2^6 apart, the factor is the next power
/// of two instead: the shift is exact, the largest product weighs 1 and the others nothing.
struct Exponents {
  float factor, shift;
  MSA_INLINE Exponents(float max, float c) : factor(c), shift(-(max * c)) {
    if (std::fabs(shift) < 0x1p30f) [[likely]]
      return;
    factor = std::bit_cast<float>((std::bit_cast<uint32_t>(c) + 0x7fffffu) & 0x7f800000u);
    shift = max == -kInfinity ? 0.0f : -(max * factor);
  }
};

/// What n products s, `step` apart, need to become exponents of probabilities: s * c + shift. An
/// LSE of 2^24 and more stands for all logits near it, whose probability is 1: such products are
/// replaced by those that give the right exponent, at most 0, with a shift of 0.
MSA_INLINE float probability_shift(float lse, float c, float* s, int64_t n, int64_t step = 1) {
  if (!(std::fabs(lse) >= 0x1p24f)) [[likely]]
    return -lse * kLog2E;
  if (std::fabs(lse) == kInfinity) return -kInfinity;  // of nothing
  const float shift = (std::fabs(lse) * 0x1p-21f - lse) * kLog2E;
  for (int64_t i = 0; i < n * step; i += step) {
    const float x = s[i] * c + shift;
    s[i] = x > 0 ? 0 : x / c;  // NaN stays
  }
  return 0;
}

/// One row against one piece: S becomes P, the running maximum and sum move on, O is rescaled if
/// need be.
template <class Isa>
MSA_INLINE void softmax_row(float* s, typename Isa::Elem* p, int64_t valid, int64_t cols, float c,
                            float& m, float& l, float* o, int64_t ldo, float* raw_max) {
  using Vec = typename Isa::Vec;
  hide_invisible(s, valid, cols);
  float best = row_max<Isa>(s, cols);
  if (raw_max != nullptr && best > *raw_max) *raw_max = best;
  if (c < 0) {  // the largest logit is that of the smallest product
    for (int64_t col = 0; col < valid; ++col) s[col] = -s[col];
    best = row_max<Isa>(s, cols);
    c = -c;
  }
  const float m_new = best > m ? best : m;
  const Exponents exponents(m_new, c);
  const Vec factor = Isa::set1(exponents.factor), shift = Isa::set1(exponents.shift);
  Vec even = Isa::zero(), odd = Isa::zero();
  for (int64_t col = 0; col < cols; col += 2 * Isa::kLanes) {
    const Vec x = Isa::exp2(Isa::fma(Isa::load(s + col), factor, shift));
    const Vec y = Isa::exp2(Isa::fma(Isa::load(s + col + Isa::kLanes), factor, shift));
    even = Isa::add(even, x);
    odd = Isa::add(odd, y);
    Isa::store_p(p + col, x);
    Isa::store_p(p + col + Isa::kLanes, y);
  }
  if (m_new > m && l != 0.0f) {
    const float keep = std::exp2(exponents.shift - Exponents(m, c).shift);
    l *= keep;
    const Vec k = Isa::set1(keep);
    for (int64_t d = 0; d < ldo; d += Isa::kLanes) Isa::store(o + d, Isa::mul(Isa::load(o + d), k));
  }
  m = m_new;
  l += Isa::reduce_add(Isa::add(even, odd));
}

/// LSE of a row whose largest product is m and whose weights add up to l.
MSA_INLINE float lse_of(float m, float l, float c) {
  return l == 0.0f ? -kInfinity : m * std::fabs(c) * kLn2 + std::log(l);
}

}  // namespace msa::cpu
