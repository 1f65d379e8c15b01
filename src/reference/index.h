// The index branch: scores of blocks, and the choice of K of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "reference/rows.h"

namespace msa::reference {

inline constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// max over the visible tokens s of given block j of q . k[s]; -inf if there is none.
template <class Real>
float block_score(Row q, const TensorView& keys, int64_t head, int64_t dim, const Query& query,
                  int64_t j) {
  Real best = -std::numeric_limits<Real>::infinity();
  for (int64_t s = j * query.s.block_size; s < query.block_end(j); ++s) {
    const Real score = dot<Real>(q, key_row(keys, query.s, s, head), dim);
    if (score > best) best = score;  // never true for NaN
  }
  return static_cast<float>(best);
}

/// Blocks that are chosen whatever their score: the first `init` and those in
/// (last_local - local, last_local]. Global ids.
struct Forced {
  int64_t init;
  int64_t local;
  int64_t last_local;  ///< the local block

  bool operator()(int64_t id) const {
    return id < init || (id > last_local - local && id <= last_local);
  }
};

/// Chooses min(topk, blocks) of the ids first .. first + blocks - 1 by `score(j)`, j counted from
/// `first`. order: scratch for `blocks` ints. scores_out may be null.
template <class Score>
void select(const Score& score, int64_t first, int64_t blocks, const Forced& forced, int64_t topk,
            int32_t* order, int32_t* ids, float* scores_out) {
  const auto better = [&](int32_t a, int32_t b) {
    const bool a_forced = forced(first + a), b_forced = forced(first + b);
    if (a_forced || b_forced) return a_forced && (!b_forced || a < b);
    const float x = std::isnan(score(a)) ? kMinusInfinity : score(a);
    const float y = std::isnan(score(b)) ? kMinusInfinity : score(b);
    return x > y || (x == y && a < b);  // -0 == +0
  };
  const int64_t count = std::min(topk, blocks);
  for (int64_t j = 0; j < blocks; ++j) order[j] = static_cast<int32_t>(j);
  std::partial_sort(order, order + count, order + blocks, better);
  std::sort(order, order + count);
  for (int64_t slot = 0; slot < topk; ++slot) {
    const int64_t id = slot < count ? first + order[slot] : -1;
    ids[slot] = static_cast<int32_t>(id);
    if (scores_out == nullptr) continue;
    scores_out[slot] = slot >= count ? kMinusInfinity
                       : forced(id)  ? std::numeric_limits<float>::infinity()
                                     : score(order[slot]);
  }
}

template <class Real>
void compute(const Problem& p, const IndexScoresParams& a, const Team& team) {
  team.for_each(a.q_idx.shape[0], [&](int64_t t, std::byte*) {
    const Query query = query_at(a.batch, t, p.block_size);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      for (int64_t j = 0; j < a.scores.shape[2]; ++j)
        *a.scores.at<float>(r, t, j) =
            block_score<Real>(row(a.q_idx, t, r), a.k_idx, 0, p.index_dim, query, j);
    }
  });
}

template <class Real>
void compute(const Problem& p, const SelectBlocksParams& a, const Team& team) {
  team.for_each(a.scores.shape[1], [&](int64_t t, std::byte* scratch) {
    const int64_t blocks =
        a.num_valid_blocks.given() ? *a.num_valid_blocks.at<const int32_t>(t) : a.scores.shape[2];
    const Forced forced{p.init_blocks, p.local_blocks, blocks - 1};
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      const auto score = [&](int64_t j) { return *a.scores.at<const float>(r, t, j); };
      select(score, 0, blocks, forced, p.topk, reinterpret_cast<int32_t*>(scratch),
             a.block_ids.at<int32_t>(r, t), nullptr);
    }
  });
}

template <class Real>
void compute(const Problem& p, const IndexSelectParams& a, const Team& team) {
  team.for_each(a.q_idx.shape[0], [&](int64_t t, std::byte* scratch) {
    const Query query = query_at(a.batch, t, p.block_size);
    const int64_t blocks = query.visible_blocks();
    const Forced forced{p.init_blocks, p.local_blocks, query.s.local_block(query.i)};
    float* scores = reinterpret_cast<float*>(scratch);
    int32_t* order = reinterpret_cast<int32_t*>(scores + blocks);
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      for (int64_t j = 0; j < blocks; ++j)
        scores[j] = block_score<Real>(row(a.q_idx, t, r), a.k_idx, 0, p.index_dim, query, j);
      select([&](int64_t j) { return scores[j]; }, query.s.block0, blocks, forced, p.topk, order,
             a.block_ids.at<int32_t>(r, t), a.scores.given() ? a.scores.at<float>(r, t) : nullptr);
    }
  });
}

/// Entry i of the row's parts is the i-th of all, part by part. The best is looked for K times.
template <class Real>
void compute(const Problem& p, const MergeListsParams& a, const Team& team) {
  team.for_each(a.block_ids.shape[1], [&](int64_t t, std::byte*) {
    for (int64_t r = 0; r < p.heads_kv; ++r) {
      const auto id = [&](int64_t i) {
        return *a.block_ids_parts.at<const int32_t>(i / p.topk, r, t, i % p.topk);
      };
      const auto score = [&](int64_t i) {
        const float x = *a.scores_parts.at<const float>(i / p.topk, r, t, i % p.topk);
        return std::isnan(x) ? kMinusInfinity : x;
      };
      const auto better = [&](int64_t i, int64_t j) {
        return score(i) > score(j) || (score(i) == score(j) && id(i) < id(j));
      };
      int32_t* ids = a.block_ids.at<int32_t>(r, t);
      float* scores = a.scores.given() ? a.scores.at<float>(r, t) : nullptr;
      const auto put = [&](int64_t slot, int32_t block, float x) {
        ids[slot] = block;
        if (scores != nullptr) scores[slot] = x;
      };
      int64_t last = -1;
      for (int64_t count = 0; count < p.topk; ++count) {
        int64_t best = -1;
        for (int64_t i = 0; i < a.scores_parts.shape[0] * p.topk; ++i) {
          if (id(i) >= 0 && (last < 0 || better(last, i)) && (best < 0 || better(i, best)))
            best = i;
        }
        if (best < 0) {  // the tail
          for (int64_t slot = count; slot < p.topk; ++slot) put(slot, -1, kMinusInfinity);
          break;
        }
        int64_t slot = count;  // ascending
        for (; slot > 0 && ids[slot - 1] > id(best); --slot)
          put(slot, ids[slot - 1], scores != nullptr ? scores[slot - 1] : 0);
        put(slot, id(best), score(best));
        last = best;
      }
    }
  });
}

}  // namespace msa::reference
