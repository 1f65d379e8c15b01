// Training: gradients of attention, and the KL loss of the index branch with its gradients.
//
// The gradient of a query sums over keys, that of a key over queries. Each has a loop of its own,
// which recomputes the probabilities from the stored LSEs: every element is one sum in one order.
#pragma once

#include <cmath>

#include "reference/attention.h"
#include "reference/rows.h"

namespace msa::reference {

/// The list of a query row of KV head r, null when all blocks count.
inline const int32_t* list_of(const TensorView& ids, int64_t r, int64_t t) {
  return ids.given() ? ids.at<const int32_t>(r, t) : nullptr;
}

/// visit(query) for the queries that read a key for KV head r.
template <class Visit>
void for_each_reader(const Problem& p, const TensorView& ids, const Key& key, int64_t r,
                     const Visit& visit) {
  for (int64_t i = 0; i < key.s.q_len; ++i) {
    const Query query{.s = key.s, .i = i, .row = key.s.q_begin + i};
    if (reads(query, list_of(ids, r, query.row), p.topk, key.token)) visit(query);
  }
}

template <class Real>
void store_row(const TensorView& out, int64_t offset, const Real* row, int64_t n) {
  for (int64_t d = 0; d < n; ++d)
    store_f32(out.data, out.dtype, offset + d, static_cast<float>(row[d]));
}

// ---- attention
// -----------------------------------------------------------------------------------

/// What a query head t, h and a key of its KV head are to each other.
template <class Real>
struct PairGradient {
  Real p = 0;   ///< probability: dv += p d_o
  Real ds = 0;  ///< gradient of q . k: dq += ds k, dk += ds q
};

template <class Real>
PairGradient<Real> pair_gradient(const Problem& p, const AttentionBackwardParams& a, int64_t t,
                                 int64_t h, Row k, Row v) {
  const float lse = *a.lse.at<const float>(t, h);
  if (lse == kMinusInfinity) return {};
  const Real scale = scale_of<Real>(a.softmax_scale, p.head_dim);
  const Row d_o = row(a.d_o, t, h);
  const Real delta = dot<Real>(row(a.o, t, h), d_o, p.head_dim);
  const Real logit = dot<Real>(row(a.q, t, h), k, p.head_dim) * scale;
  const Real probability = std::exp(log_probability(logit, lse));
  return {probability, probability * (dot<Real>(d_o, v, p.head_dim) - delta) * scale};
}

template <class Real>
void compute(const Problem& p, const AttentionBackwardParams& a, const Team& team) {
  const int64_t group = p.group();
  team.for_each(a.q.shape[0], [&](int64_t t, std::byte* scratch) {
    Real* dq = reinterpret_cast<Real*>(scratch);
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const int64_t r = h / group;
      std::fill_n(dq, p.head_dim, Real{0});
      for_each_token(query, list_of(a.block_ids, r, t), p.topk, [&](int64_t s) {
        const Row k = key_row(a.k, query.s, s, r);
        const auto pair = pair_gradient<Real>(p, a, t, h, k, key_row(a.v, query.s, s, r));
        add_scaled(dq, pair.ds, k, p.head_dim);
      });
      store_row(a.dq, a.dq.offset(t, h), dq, p.head_dim);
    }
  });
  team.for_each(a.k.shape[0], [&](int64_t row_of_k, std::byte* scratch) {
    Real* dk = reinterpret_cast<Real*>(scratch);
    Real* dv = dk + p.head_dim;
    const Key key = key_at(a.batch, row_of_k, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      std::fill_n(dk, 2 * p.head_dim, Real{0});
      for_each_reader(p, a.block_ids, key, r, [&](const Query& query) {
        for (int64_t h = r * group; h < (r + 1) * group; ++h) {
          const auto pair =
              pair_gradient<Real>(p, a, query.row, h, row(a.k, row_of_k, r), row(a.v, row_of_k, r));
          add_scaled(dk, pair.ds, row(a.q, query.row, h), p.head_dim);
          add_scaled(dv, pair.p, row(a.d_o, query.row, h), p.head_dim);
        }
      });
      store_row(a.dk, a.dk.offset(row_of_k, r), dk, p.head_dim);
      store_row(a.dv, a.dv.offset(row_of_k, r), dv, p.head_dim);
    }
  });
}

// ---- the index branch
// ----------------------------------------------------------------------------

template <class Real>
Real index_logit(const Problem& p, Row q_idx, Row k_idx) {
  return dot<Real>(q_idx, k_idx, p.index_dim) * scale_of<Real>(0, p.index_dim);
}

template <class Real>
void compute(const Problem& p, const IndexLseParams& a, const Team& team) {
  team.for_each(a.q_idx.shape[0], [&](int64_t t, std::byte*) {
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      const auto for_each_logit = [&](const auto& body) {
        for_each_token(query, list_of(a.block_ids, r, t), p.topk, [&](int64_t s) {
          body(index_logit<Real>(p, row(a.q_idx, t, r), key_row(a.k_idx, query.s, s, 0)));
        });
      };
      Real max = -std::numeric_limits<Real>::infinity(), sum = 0;
      for_each_logit([&](Real logit) { max = std::max(max, logit); });
      for_each_logit([&](Real logit) { sum += std::exp(logit - max); });
      *a.lse.at<float>(t, r) = sum == 0 ? kMinusInfinity : static_cast<float>(max + std::log(sum));
    }
  });
}

/// The two distributions of a query row and group at one token.
template <class Real>
struct Distributions {
  Real teacher = 0;
  Real log_student = -std::numeric_limits<Real>::infinity();

  Real difference() const { return std::exp(log_student) - teacher; }
  Real divergence() const { return teacher == 0 ? 0 : teacher * (std::log(teacher) - log_student); }
};

template <class Real>
Distributions<Real> distributions(const Problem& p, const KlParams& a, int64_t t, int64_t r, Row k,
                                  Row k_idx) {
  const Real scale = scale_of<Real>(a.softmax_scale, p.head_dim);
  const float index_lse = *a.index_lse.at<const float>(t, r);
  Distributions<Real> out;
  if (index_lse == kMinusInfinity) return out;
  out.log_student = log_probability(index_logit<Real>(p, row(a.q_idx, t, r), k_idx), index_lse);
  const int64_t group = p.group();
  for (int64_t h = r * group; h < (r + 1) * group; ++h) {
    const Real logit = dot<Real>(row(a.q, t, h), k, p.head_dim) * scale;
    out.teacher += std::exp(log_probability(logit, *a.lse.at<const float>(t, h)));
  }
  out.teacher /= static_cast<Real>(group);
  return out;
}

/// The gradient of the loss by q_idx . k_idx is this factor times (student - teacher).
template <class Real>
Real kl_factor(const Problem& p, const KlParams& a) {
  const auto queries =
      static_cast<Real>(*a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch)));
  return scale_of<Real>(0, p.index_dim) / (queries * static_cast<Real>(p.heads_kv));
}

template <class Real>
void compute(const Problem& p, const KlParams& a, const Team& team) {
  const bool gradients = p.op == Op::kKlBackward;
  const Real factor = kl_factor<Real>(p, a);
  team.for_each(a.q.shape[0], [&](int64_t t, std::byte* scratch) {
    Real* dq = reinterpret_cast<Real*>(scratch);
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      Real divergence = 0;
      std::fill_n(dq, p.index_dim, Real{0});
      for_each_token(query, list_of(a.block_ids, r, t), p.topk, [&](int64_t s) {
        const Row k_idx = key_row(a.k_idx, query.s, s, 0);
        const auto both = distributions<Real>(p, a, t, r, key_row(a.k, query.s, s, r), k_idx);
        add_scaled(dq, both.difference() * factor, k_idx, p.index_dim);
        divergence += both.divergence();
      });
      if (gradients) store_row(a.dq_idx, a.dq_idx.offset(t, r), dq, p.index_dim);
      if (a.kl.given()) *a.kl.at<float>(t, r) = static_cast<float>(divergence);
    }
  });
  if (!gradients) return;
  team.for_each(a.k_idx.shape[0], [&](int64_t row_of_k, std::byte* scratch) {
    Real* dk = reinterpret_cast<Real*>(scratch);
    std::fill_n(dk, p.index_dim, Real{0});
    const Key key = key_at(a.batch, row_of_k, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      for_each_reader(p, a.block_ids, key, r, [&](const Query& query) {
        const auto both =
            distributions<Real>(p, a, query.row, r, row(a.k, row_of_k, r), row(a.k_idx, row_of_k));
        add_scaled(dk, both.difference() * factor, row(a.q_idx, query.row, r), p.index_dim);
      });
    }
    store_row(a.dk_idx, a.dk_idx.offset(row_of_k), dk, p.index_dim);
  });
}

}  // namespace msa::reference
