// The index branch: block scores (matrix product, then the maximum over each block) and the running
// top-K.
//
// A tile of queries x index heads shares the one index key of each token. Prefill keeps a top-K
// list per row and stores no scores. Plans for short extends (max_seqlen_q <= kShortLen) split the
// keys over tasks instead: block scores go to the workspace, and a second loop selects. Ids do not
// depend on the way taken: a score is the same sum in the same order in each.
#pragma once

#include "cpu/generic/tile.h"
#include "cpu/plain.h"

namespace msa::cpu {

inline constexpr int64_t kIndexRows =
    512;  // rows of a tile: each packed key block is used this often
inline constexpr int64_t kShortLen = 64;     // plans up to this q_len split the keys
inline constexpr int64_t kShortBlocks = 16;  // blocks of one task then
inline constexpr int64_t kDotRows =
    8;  // sequences with at most as many rows read keys without packing

template <class Isa>
struct IndexScratch {
  using Elem = typename Isa::Elem;
  int64_t lda;
  Elem *a, *panels;   // [rows,lda]; panels of kPiece keys
  float *s, *best;    // [kChunk,kPiece]; [rows] maximum over the current block
  float* threshold;   // [rows] what it must exceed to enter the row's list
  float* q;           // [kDotRows,Di] f32 queries of the unpacked path
  float* top_scores;  // [rows,K]
  int32_t *top_ids, *top_count;

  MSA_INLINE IndexScratch(Arena& arena, const Problem& p, int64_t tile_q) {
    const int64_t rows = tile_q * p.heads_kv + Isa::kChunk;
    lda = padded_depth<Isa>(p.index_dim);
    a = arena.take<Elem>(rows * lda);
    panels = arena.take<Elem>(kPiece * lda);
    s = arena.take<float>(Isa::kChunk * kPiece);
    best = arena.take<float>(rows);
    threshold = arena.take<float>(rows);
    q = arena.take<float>(kDotRows * round_up(p.index_dim, Isa::kLanes));
    top_scores = arena.take<float>(rows * p.topk);
    top_ids = arena.take<int32_t>(rows * p.topk);
    top_count = arena.take<int32_t>(rows);
  }
  MSA_INLINE TopK top(int64_t row, const Problem& p, int32_t forced) const {
    return {top_scores + row * p.topk, top_ids + row * p.topk, top_count + row, threshold + row,
            p.topk - forced};
  }
};

/// Dot products of R rows with 4 keys at a time, straight from the cache: for a few rows a pass
/// over memory is all that counts. out[r*kPiece + key].
template <class Isa, DType T, int R>
void dot_keys(const float* q, int64_t ldq, const BlockRows& keys, int64_t n, int64_t dim,
              float* out) {
  using Vec = typename Isa::Vec;
  alignas(64) std::byte padded[static_cast<size_t>(4 * (kMaxHeadDim + 64) * 4)];
  const int64_t width = round_up(dim, Isa::kLanes);
  for (int64_t key = 0; key < n; key += 4) {
    const std::byte* row[4];
    readable_rows<T>(keys, key, n, 4, dim, width, padded, row);
    // The hardware's streams end at every 4 KB: ask for what comes 16 keys later, also in the next
    // block.
    for (int i = 0; i < 4; ++i) {
      const std::byte* later = keys.data + (key + 16 + i) * keys.token_stride * size_of(T);
      for (int64_t d = 0; d < dim * size_of(T); d += 64) __builtin_prefetch(later + d);
    }
    Vec sum[R][4];
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) sum[r][i] = Isa::zero();
    }
    for (int64_t d = 0; d < width; d += Isa::kLanes) {
      Vec k[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) k[i] = Isa::template load_as<T>(row[i] + d * size_of(T));
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        const Vec x = Isa::load(q + r * ldq + d);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum[r][i] = Isa::fma(x, k[i], sum[r][i]);
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int i = 0; i < 4; ++i) out[r * kPiece + key + i] = Isa::reduce_add(sum[r][i]);
    }
  }
}

/// A tile of queries q0 .. q0+nq-1 of one sequence, all index heads: row = query * Hi + head.
template <class Isa>
struct IndexTile {
  const TensorView &q_idx, &k_idx;
  const Problem& p;
  const Sequence& s;
  int64_t q0, nq;
  const IndexScratch<Isa>& w;

  MSA_INLINE int64_t rows() const { return nq * p.heads_kv; }
  /// A property of the sequence, not of the tile: the order of the sums must not depend on the cut.
  MSA_INLINE bool unpacked() const { return s.q_len * p.heads_kv <= kDotRows; }

  void begin() const {
    load_queries<Isa>(q_idx, s.q_begin + q0, nq, 0, p.heads_kv, w.a, w.lda);
    if (!unpacked()) return;
    const int64_t ldq = round_up(p.index_dim, Isa::kLanes);
    with_dtype<Isa>(q_idx.dtype, [&]<DType T>() {
      for (int64_t r = 0; r < rows(); ++r) {
        const int64_t offset = q_idx.offset(s.q_begin + q0 + r / p.heads_kv, r % p.heads_kv);
        const auto* row = static_cast<const std::byte*>(q_idx.data) + offset * size_of(T);
        alignas(64) std::byte padded[(kMaxHeadDim + 64) * 4]{};
        std::memcpy(padded, row, static_cast<size_t>(p.index_dim * size_of(T)));
        for (int64_t d = 0; d < ldq; d += Isa::kLanes) {
          Isa::store(w.q + r * ldq + d, Isa::template load_as<T>(padded + d * size_of(T)));
        }
      }
    });
  }

  /// best[row] = maximum over the visible keys of given block j; returns the first query that sees
  /// any.
  int64_t score_block(int64_t j) const {
    const int64_t end = least((j + 1) * p.block_size, s.visible(q0 + nq - 1));
    int64_t first = 0;
    while (s.visible(q0 + first) <= j * p.block_size) ++first;
    for (int64_t r = first * p.heads_kv; r < rows(); ++r) w.best[r] = -kInfinity;
    for (int64_t start = j * p.block_size; start < end; start += kPiece) {
      const int64_t n = least(kPiece, end - start);
      BlockRows keys = block_rows(k_idx, s, j, 0);
      keys.data += (start - j * p.block_size) * keys.token_stride * size_of(k_idx.dtype);
      if (unpacked()) {
        dot_rows(keys, n);
        keep_best(0, rows(), start, n);
        continue;
      }
      pack_keys<Isa>(k_idx.dtype, keys, n, p.index_dim, w.panels);
      for (int64_t r0 = first * p.heads_kv; r0 < rows(); r0 += Isa::kChunk) {
        const int64_t count = least(Isa::kChunk, rows() - r0);
        float* scores[Isa::kChunk];
        for (int64_t r = 0; r < count; ++r) scores[r] = w.s + r * kPiece;
        gemm<Isa>(w.a + r0 * w.lda, w.lda, count, w.panels, w.lda * Isa::kCols, w.lda,
                  round_up(n, Isa::kCols), scores, kPiece, false);
        keep_best(r0, count, start, n);
      }
    }
    return first;
  }

  void keep_best(int64_t r0, int64_t count, int64_t start, int64_t n) const {
    const int64_t cols = round_up(n, Isa::kCols);
    for (int64_t r = 0; r < count; ++r) {
      float* scores = w.s + r * kPiece;
      hide_invisible(scores, most(0, least(s.visible(q0 + (r0 + r) / p.heads_kv) - start, n)),
                     cols);
      const float best = row_max<Isa>(scores, cols);
      if (best > w.best[r0 + r]) w.best[r0 + r] = best;
    }
  }

  void dot_rows(const BlockRows& keys, int64_t n) const {
    const int64_t ldq = round_up(p.index_dim, Isa::kLanes);
    with_dtype<Isa>(k_idx.dtype, [&]<DType T>() {
      int64_t r = 0;
      for (; r + 2 <= rows(); r += 2)
        dot_keys<Isa, T, 2>(w.q + r * ldq, ldq, keys, n, p.index_dim, w.s + r * kPiece);
      if (r < rows())
        dot_keys<Isa, T, 1>(w.q + r * ldq, ldq, keys, n, p.index_dim, w.s + r * kPiece);
    });
  }
};

MSA_INLINE int64_t index_tile(const Problem& p, const Limits& limits) {
  return balanced_tile(kIndexRows / p.heads_kv, limits, 1);
}

/// Block scores of the whole call into scores [Hi,T,blocks], tiles of queries by slices of blocks.
template <class Isa>
void score_all(const Plan& plan, const TensorView& q_idx, const TensorView& k_idx,
               const Batch& batch, const TensorView& scores, std::byte* workers, Queue queue) {
  const Problem& p = plan.problem;
  const int64_t tile_q = index_tile(p, plan.limits), sequences = batch_size(batch);
  int64_t most_blocks = 0;
  for (int64_t b = 0; b < sequences; ++b)
    most_blocks = most(most_blocks, sequence(batch, b, p.block_size).blocks());
  const int64_t tiles = tiles_of(batch, tile_q);
  const int64_t slices = (most_blocks + kShortBlocks - 1) / kShortBlocks;
  Arena one(nullptr);
  IndexScratch<Isa>(one, p, tile_q);
  for_each_task(queue, tiles * sequences * slices, [&](int64_t task, int worker) {
    const Sequence s = sequence(batch, task / slices % sequences, p.block_size);
    const int64_t q0 = task / (slices * sequences) * tile_q,
                  first_block = task % slices * kShortBlocks;
    if (q0 >= s.q_len || first_block >= s.blocks()) return;
    Arena arena(workers + worker * one.used());
    const IndexScratch<Isa> w(arena, p, tile_q);
    const IndexTile<Isa> tile{q_idx, k_idx, p, s, q0, least(tile_q, s.q_len - q0), w};
    Isa::begin();
    tile.begin();
    const int64_t last_block =
        least(first_block + kShortBlocks, s.visible_blocks(q0 + tile.nq - 1));
    for (int64_t j = first_block; j < last_block; ++j) {
      for (int64_t r = tile.score_block(j) * p.heads_kv; r < tile.rows(); ++r) {
        *scores.at<float>(r % p.heads_kv, s.q_begin + q0 + r / p.heads_kv, j) = w.best[r];
      }
    }
    Isa::end();
  });
}

/// Where a query's list goes.
MSA_INLINE void write_list(const IndexSelectParams& a, const TopK& top, const Forced& forced,
                           int64_t begin, int64_t end, int32_t k, int64_t head, int64_t token) {
  finish_topk(top, forced, begin, end, k, a.block_ids.at<int32_t>(head, token),
              a.scores.given() ? a.scores.at<float>(head, token) : nullptr);
}

/// Scores in the workspace, then one selection per (token, head).
template <class Isa>
void select_short(const Plan& plan, const IndexSelectParams& a, Workspace workspace, Queue queue) {
  const Problem& p = plan.problem;
  const int64_t blocks = (plan.limits.max_seqlen_k + p.block_size - 1) / p.block_size;
  auto* memory = static_cast<std::byte*>(workspace.data);
  Arena shared(memory), one(nullptr);
  const TensorView scores =
      TensorView::contiguous(shared.take<float>(p.heads_kv * plan.limits.max_tokens * blocks),
                             DType::kF32, {p.heads_kv, plan.limits.max_tokens, blocks});
  IndexScratch<Isa>(one, p, index_tile(p, plan.limits));
  score_all<Isa>(plan, a.q_idx, a.k_idx, a.batch, scores, memory + shared.used(), queue);

  for_each_task(queue, batch_size(a.batch), [&](int64_t b, int worker) {
    const Sequence s = sequence(a.batch, b, p.block_size);
    Arena arena(memory + shared.used() + worker * one.used());
    const IndexScratch<Isa> w(arena, p, index_tile(p, plan.limits));
    for (int64_t i = 0; i < s.q_len; ++i) {
      const int64_t end = s.visible_blocks(i), token = s.q_begin + i;
      const Forced forced = forced_blocks(p, s.local_block(i));
      for (int64_t head = 0; head < p.heads_kv; ++head) {
        TopK top = w.top(0, p, count_forced(forced, s.block0, s.block0 + end));
        top.clear();
        const float* row = scores.at<float>(head, token);
        for (int64_t j = 0; j < end; ++j) {
          if (row[j] > *top.threshold && !forced.contains(s.block0 + j)) {
            top.insert(row[j], static_cast<int32_t>(s.block0 + j));
          }
        }
        write_list(a, top, forced, s.block0, s.block0 + end, p.topk, head, token);
      }
    }
  });
}

/// One pass over the keys with a running list per row.
template <class Isa>
void select_fused(const Plan& plan, const IndexSelectParams& a, Workspace workspace, Queue queue) {
  const Problem& p = plan.problem;
  const int64_t tile_q = index_tile(p, plan.limits), sequences = batch_size(a.batch),
                heads = p.heads_kv;
  const int64_t tiles = tiles_of(a.batch, tile_q);
  Arena one(nullptr);
  IndexScratch<Isa>(one, p, tile_q);
  for_each_task(queue, tiles * sequences, [&](int64_t task, int worker) {
    const Sequence s = sequence(a.batch, task % sequences, p.block_size);
    const int64_t q0 = (tiles - 1 - task / sequences) * tile_q;  // the longest first
    if (q0 >= s.q_len) return;
    Arena arena(static_cast<std::byte*>(workspace.data) + worker * one.used());
    const IndexScratch<Isa> w(arena, p, tile_q);
    const IndexTile<Isa> tile{a.q_idx, a.k_idx, p, s, q0, least(tile_q, s.q_len - q0), w};
    const auto forced_of = [&](int64_t r) {
      return forced_blocks(p, s.local_block(q0 + r / heads));
    };
    const auto top_of = [&](int64_t r) {
      const int64_t end = s.block0 + s.visible_blocks(q0 + r / heads);
      return w.top(r, p, count_forced(forced_of(r), s.block0, end));
    };
    Isa::begin();
    tile.begin();
    for (int64_t r = 0; r < tile.rows(); ++r) top_of(r).clear();
    for (int64_t j = 0; j < s.visible_blocks(q0 + tile.nq - 1); ++j) {
      for (int64_t r = tile.score_block(j) * heads; r < tile.rows(); ++r) {
        if (w.best[r] > w.threshold[r] && !forced_of(r).contains(s.block0 + j)) {
          top_of(r).insert(w.best[r], static_cast<int32_t>(s.block0 + j));
        }
      }
    }
    Isa::end();
    for (int64_t r = 0; r < tile.rows(); ++r) {
      const int64_t end = s.block0 + s.visible_blocks(q0 + r / heads);
      write_list(a, top_of(r), forced_of(r), s.block0, end, p.topk, r % heads,
                 s.q_begin + q0 + r / heads);
    }
  });
}

template <class Isa>
int64_t index_bytes(const Problem& p, const Limits& limits) {
  Arena one(nullptr), shared(nullptr);
  IndexScratch<Isa>(one, p, index_tile(p, limits));
  if (p.op == Op::kIndexSelect && limits.max_seqlen_q <= kShortLen) {
    shared.take<float>(p.heads_kv * limits.max_tokens *
                       ((limits.max_seqlen_k + p.block_size - 1) / p.block_size));
  }
  return shared.used() + one.used() * limits.max_threads;
}

template <class Isa>
void run_index_select(const Plan& plan, const IndexSelectParams& a, Workspace workspace,
                      Queue queue) {
  if (plan.limits.max_seqlen_q <= kShortLen) {
    select_short<Isa>(plan, a, workspace, queue);
  } else {
    select_fused<Isa>(plan, a, workspace, queue);
  }
  const int64_t used = *a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch));
  for (int64_t token = used; token < a.q_idx.shape[0]; ++token) {
    int32_t none = 0;
    for (int64_t head = 0; head < plan.problem.heads_kv; ++head) {
      write_list(a, {nullptr, nullptr, &none, nullptr, 0}, {}, 0, 0, plan.problem.topk, head,
                 token);
    }
  }
}

template <class Isa>
void run_index_scores(const Plan& plan, const IndexScoresParams& a, Workspace workspace,
                      Queue queue) {
  for (int64_t h = 0; h < a.scores.shape[0]; ++h) {
    for (int64_t t = 0; t < a.scores.shape[1]; ++t) {
      for (int64_t j = 0; j < a.scores.shape[2]; ++j) *a.scores.at<float>(h, t, j) = -kInfinity;
    }
  }
  score_all<Isa>(plan, a.q_idx, a.k_idx, a.batch, a.scores, static_cast<std::byte*>(workspace.data),
                 queue);
}

}  // namespace msa::cpu
