// Attention: softmax over the tokens a query sees, its partial results, and its mass per block.
#pragma once

#include <cmath>
#include <limits>

#include "reference/index.h"
#include "reference/rows.h"

namespace msa::reference {

template <class Real>
Real scale_of(float softmax_scale, int64_t dim) {
  return softmax_scale != 0 ? static_cast<Real>(softmax_scale)
                            : 1 / std::sqrt(static_cast<Real>(dim));
}

/// The logarithm of the probability that a given LSE leaves to a logit. A large LSE stands for all
/// logits near it: each has the probability 1.
template <class Real>
Real log_probability(Real logit, float lse) {
  if (lse == kMinusInfinity) return lse;
  const Real difference = logit - static_cast<Real>(lse);
  if (!(std::abs(lse) >= 0x1p24f)) return difference;
  return std::min<Real>(0, difference + static_cast<Real>(std::abs(lse)) * Real{0x1p-21});
}

/// o = softmax(q . k * scale) v and lse for query head h, over the visible tokens of the blocks in
/// `ids`, of all if null. scratch: a logit per token and D sums.
template <class Real, class Params>
void attend(const Problem& p, const Params& a, const Query& query, int64_t h, const int32_t* ids,
            std::byte* scratch) {
  const int64_t kv_head = h / p.group();
  const Real scale = scale_of<Real>(a.softmax_scale, p.head_dim);
  Real* sums = reinterpret_cast<Real*>(scratch);
  Real* logits = sums + p.head_dim;

  Real max = -std::numeric_limits<Real>::infinity();
  int64_t tokens = 0;
  for_each_token(query, ids, p.topk, [&](int64_t s) {
    const Row k = key_row(a.k, query.s, s, kv_head);
    logits[tokens] = dot<Real>(row(a.q, query.row, h), k, p.head_dim) * scale;
    max = std::max(max, logits[tokens++]);
  });

  std::fill_n(sums, p.head_dim, Real{0});
  Real sum = 0;
  const Real* logit = logits;
  for_each_token(query, ids, p.topk, [&](int64_t s) {
    const Real weight = std::exp(*logit++ - max);
    sum += weight;
    add_scaled(sums, weight, key_row(a.v, query.s, s, kv_head), p.head_dim);
  });

  const int64_t o = a.o.offset(query.row, h);
  for (int64_t d = 0; d < p.head_dim; ++d)
    store_f32(a.o.data, a.o.dtype, o + d, tokens == 0 ? 0 : static_cast<float>(sums[d] / sum));
  if (a.lse.given()) {
    *a.lse.template at<float>(query.row, h) =
        tokens == 0 ? kMinusInfinity : static_cast<float>(max + std::log(sum));
  }
}

template <class Real>
void compute(const Problem& p, const SparseAttentionParams& a, const Team& team) {
  team.for_each(a.q.shape[0], [&](int64_t t, std::byte* scratch) {
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const int32_t* ids = a.block_ids.at<const int32_t>(h / p.group(), t);
      attend<Real>(p, a, query, h, ids, scratch);
    }
  });
}

template <class Real>
void compute(const Problem& p, const DenseAttentionParams& a, const Team& team) {
  team.for_each(a.q.shape[0], [&](int64_t t, std::byte* scratch) {
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t h = 0; h < p.heads_q; ++h) {
      attend<Real>(p, a, query, h, nullptr, scratch);
      for (int64_t j = 0; a.block_max.given() && j < a.block_max.shape[2]; ++j)
        *a.block_max.at<float>(h, t, j) =
            block_score<Real>(row(a.q, t, h), a.k, h / p.group(), p.head_dim, query, j);
    }
  });
}

template <class Real>
void compute(const Problem& p, const BlockMassParams& a, const Team& team) {
  const Real scale = scale_of<Real>(a.softmax_scale, p.head_dim);
  const int64_t group = p.group();
  team.for_each(a.q.shape[0], [&](int64_t t, std::byte*) {
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      for (int64_t j = 0; j < a.mass.shape[2]; ++j) {
        Real mass = 0;
        for (int64_t s = j * p.block_size; s < query.block_end(j); ++s) {
          const Row k = key_row(a.k, query.s, s, r);
          Real of_key = 0;  // a sum of its own, since thousands of equal terms round to one side
          for (int64_t h = r * group; h < (r + 1) * group; ++h) {
            const Real logit = dot<Real>(row(a.q, t, h), k, p.head_dim) * scale;
            of_key += std::exp(log_probability(logit, *a.lse.at<const float>(t, h)));
          }
          mass += of_key;
        }
        *a.mass.at<float>(r, t, j) = static_cast<float>(mass / static_cast<Real>(group));
      }
    }
  });
}

template <class Real>
void compute(const Problem& p, const MergeParams& a, const Team& team) {
  const int64_t parts = a.o_parts.shape[0];
  team.for_each(a.o_parts.shape[1], [&](int64_t t, std::byte*) {
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const auto part_lse = [&](int64_t i) {
        return static_cast<Real>(*a.lse_parts.at<const float>(i, t, h));
      };
      Real max = kMinusInfinity;
      for (int64_t i = 0; i < parts; ++i)
        if (part_lse(i) > max || std::isnan(part_lse(i))) max = part_lse(i);  // NaN stays
      const bool empty = max == kMinusInfinity;
      Real sum = 0;
      for (int64_t i = 0; i < parts && !empty; ++i) sum += std::exp(part_lse(i) - max);

      for (int64_t d = 0; d < p.head_dim; ++d) {
        Real o = 0;
        for (int64_t i = 0; i < parts; ++i) {
          if (part_lse(i) == kMinusInfinity) continue;  // its o may hold anything
          const float part =
              load_f32(a.o_parts.data, a.o_parts.dtype, a.o_parts.offset(i, t, h, d));
          o += std::exp(part_lse(i) - max) / sum * static_cast<Real>(part);
        }
        store_f32(a.o.data, a.o.dtype, a.o.offset(t, h, d), static_cast<float>(o));
      }
      if (a.lse.given())
        *a.lse.at<float>(t, h) = static_cast<float>(empty ? max : max + std::log(sum));
    }
  });
}

}  // namespace msa::reference
