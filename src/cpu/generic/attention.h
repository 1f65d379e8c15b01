// Dense and sparse attention and block masses.
//
// The unit of work is a tile: neighbouring queries of one KV head, each query's G heads being G
// rows. The tile walks pieces of at most 128 keys. Dense attention walks all visible pieces with
// all rows; sparse attention walks the blocks that any query of the tile chose, each with the rows
// that chose it, so that a block is converted once per tile and no product is wasted. Per piece and
// chunk of rows:
//
//     S = Q K^T                     panels of keys
//     m' = max(m, rowmax S)         of the products, exact
//     P = exp2(S c - m' c);  l = l exp2(m c - m' c) + rowsum P     (c in units of log2)
//     O = O exp2(m c - m' c) + P V  panels of values
//
// Plans of decoding steps (max_seqlen_q <= kDecodeTokens) are split over keys: each split writes a
// normalised partial result, and a second loop merges them in a fixed order. What is split how
// depends on the plan alone.
#pragma once

#include <cmath>

#include "cpu/generic/softmax.h"
#include "cpu/generic/tile.h"
#include "cpu/plain.h"

namespace msa::cpu {

inline constexpr int64_t kDenseRows =
    512;  // rows of a dense tile: a packed piece is used this often
inline constexpr int64_t kSparseRows = 1024;  // more for sparse: only some rows use a piece
inline constexpr int64_t kSplitKeys = 4096;   // keys of a dense split
inline constexpr int64_t kSparseSplits = 16;  // slices of a block list
inline constexpr int64_t kEnoughTasks = 64;   // (token, KV head) pairs that need no split

/// sparse_attention and dense_attention are one function with or without lists.
struct AttentionCall {
  TensorView q, k, v;
  const TensorView* ids;  ///< null: dense
  const Batch& batch;
  float scale;
  TensorView o, lse, block_max;
};

/// How a plan cuts the work.
struct AttentionShape {
  int64_t tile_q = 1;  ///< queries of a tile
  int64_t splits = 1;

  MSA_INLINE AttentionShape(const Problem& p, const Limits& limits, bool sparse) {
    const int64_t rows = sparse ? kSparseRows : kDenseRows;
    tile_q = balanced_tile(rows / p.group(), limits, p.heads_kv);
    if (limits.max_seqlen_q <= kDecodeTokens && limits.max_tokens * p.heads_kv < kEnoughTasks) {
      splits = sparse ? least(kSparseSplits, p.topk)
                      : most(1, (limits.max_seqlen_k + kSplitKeys - 1) / kSplitKeys);
    }
  }
};

/// One worker's memory.
template <class Isa>
struct AttentionScratch {
  using Elem = typename Isa::Elem;
  int64_t lda, ldo;    // row lengths of A (query) and O
  Elem *a, *gathered;  // [rows,lda] the tile's queries; [kChunk,lda] rows that chose a block
  float *o, *m, *l;    // [rows,ldo], [rows], [rows]
  Elem *k_panels, *v_panels;
  float *s, *product;  // [kChunk,kPiece]; [kChunk,ldo] where the register tile cannot scatter
  Elem* p;             // [kChunk,kPiece], s itself for floats
  int64_t* pairs;      // [tile_q*K]

  MSA_INLINE AttentionScratch(Arena& arena, const Problem& problem, int64_t tile_q, bool sparse) {
    const int64_t rows =
        tile_q * problem.group() + Isa::kChunk;  // whole register tiles may overhang
    lda = padded_depth<Isa>(problem.head_dim);
    ldo = round_up(problem.head_dim, Isa::kCols);
    a = arena.take<Elem>(rows * lda);
    gathered = arena.take<Elem>(Isa::kChunk * lda);
    o = arena.take<float>(rows * ldo);
    m = arena.take<float>(rows);
    l = arena.take<float>(rows);
    k_panels = arena.take<Elem>(kPiece * lda);
    v_panels = arena.take<Elem>(kPiece * ldo);
    s = arena.take<float>(Isa::kChunk * kPiece);
    p = Isa::kPair == 2 ? arena.take<Elem>(Isa::kChunk * kPiece) : reinterpret_cast<Elem*>(s);
    product = arena.take<float>(Isa::kScatters ? 0 : Isa::kChunk * ldo);
    pairs = arena.take<int64_t>(sparse ? tile_q * problem.topk : 0);
  }
};

/// The values of a piece of n keys in panels of `deep` keys.
template <class Isa>
struct PieceValues {
  DType dtype;
  BlockRows rows;
  int64_t n, dim;
  typename Isa::Elem* panels;
  bool careful = false;  ///< NaN or infinities where not every row of the tile may see them

  MSA_INLINE int64_t deep() const { return round_up(n, Isa::kCols); }
  /// The first `seen` ones, the others zero.
  void pack(int64_t seen) const { pack_values<Isa>(dtype, rows, seen, deep(), dim, panels); }
};

/// O of rows [first,last) of a chunk gains P V.
template <class Isa>
MSA_INLINE void add_values(const AttentionScratch<Isa>& w, const PieceValues<Isa>& v, int64_t first,
                           int64_t last, int64_t cols, float* const* o) {
  const int64_t stride = v.deep() * Isa::kCols;
  if constexpr (Isa::kScatters) {
    gemm<Isa>(w.p + first * kPiece, kPiece, last - first, v.panels, stride, cols, w.ldo, o + first,
              w.ldo, true);
  } else {  // whole register tiles from the chunk's first row on
    float* product[Isa::kChunk];
    for (int64_t r = 0; r < last; ++r) product[r] = w.product + r * w.ldo;
    gemm<Isa>(w.p, kPiece, last, v.panels, stride, cols, w.ldo, product, w.ldo, false);
    for (int64_t r = first; r < last; ++r) {
      for (int64_t d = 0; d < w.ldo; d += Isa::kLanes) {
        Isa::store(o[r] + d, Isa::add(Isa::load(o[r] + d), Isa::load(product[r] + d)));
      }
    }
  }
}

/// Up to kChunk rows (tile rows row[0..rows), query rows in a) against a packed piece, of which
/// valid[r] keys are visible to row r.
template <class Isa>
void attend_chunk(const AttentionScratch<Isa>& w, const PieceValues<Isa>& v,
                  const typename Isa::Elem* a, int64_t rows, const int32_t* row,
                  const int32_t* valid, float c, float* raw_max) {
  int64_t cols = 0;
  for (int64_t r = 0; r < rows; ++r) cols = most(cols, valid[r]);
  cols = round_up(cols, Isa::kCols);
  float *s[Isa::kChunk], *o[Isa::kChunk];
  for (int64_t r = 0; r < rows; ++r) {
    s[r] = w.s + r * kPiece;
    o[r] = w.o + row[r] * w.ldo;
  }
  gemm<Isa>(a, w.lda, rows, w.k_panels, w.lda * Isa::kCols, w.lda, cols, s, kPiece, false);
  for (int64_t r = 0; r < rows; ++r) {
    softmax_row<Isa>(s[r], w.p + r * kPiece, valid[r], cols, c, w.m[row[r]], w.l[row[r]], o[r],
                     w.ldo, raw_max == nullptr ? nullptr : raw_max + row[r]);
  }
  if (!v.careful) return add_values<Isa>(w, v, 0, rows, cols, o);
  for (int64_t first = 0, last = 0; first < rows; first = last) {  // rows that see equally much
    while (last < rows && valid[last] == valid[first]) ++last;
    v.pack(valid[first]);
    add_values<Isa>(w, v, first, last, cols, o);
  }
}

/// A tile of queries q0 .. q0+nq-1 of one sequence and KV head.
template <class Isa>
struct AttentionTile {
  const AttentionCall& call;
  const Sequence& s;
  int64_t head, q0, nq, group;
  const AttentionScratch<Isa>& w;
  float c;  ///< scale in units of log2

  void begin() const {
    load_queries<Isa>(call.q, s.q_begin + q0, nq, head * group, group, w.a, w.lda);
    for (int64_t r = 0; r < nq * group; ++r) {
      w.m[r] = -kInfinity;
      w.l[r] = 0;
    }
    std::memset(w.o, 0, static_cast<size_t>(nq * group * w.ldo * 4));
  }

  /// Packs keys [start, start+n) of given block j, of which every row that meets them sees `seen`.
  PieceValues<Isa> pack(int64_t j, int64_t start, int64_t n, int64_t seen) const {
    BlockRows k = block_rows(call.k, s, j, head), v = block_rows(call.v, s, j, head);
    const int64_t skip = (start - j * s.block_size) * size_of(call.k.dtype);
    k.data += skip * k.token_stride;
    v.data += skip * v.token_stride;
    pack_keys<Isa>(call.k.dtype, k, n, call.q.shape[2], w.k_panels);
    PieceValues<Isa> values{call.v.dtype, v, n, call.q.shape[2], w.v_panels};
    values.careful = seen < n && has_non_finite<Isa>(call.v.dtype, v, seen, n, call.q.shape[2]);
    if (!values.careful) values.pack(n);
    return values;
  }

  /// Keys of the piece at `start` that query i sees.
  MSA_INLINE int32_t valid(int64_t i, int64_t start, int64_t n) const {
    return static_cast<int32_t>(most(0, least(s.visible(q0 + i) - start, n)));
  }

  /// Given blocks [first,last) with every query; raw_max [blocks of rows] is per block when asked
  /// for.
  void dense(int64_t first, int64_t last) const {
    const int64_t end = s.visible(q0 + nq - 1);
    alignas(64) float raw[kDenseRows];
    const bool wants_max = call.block_max.given();
    for (int64_t j = first; j < last && j * s.block_size < end; ++j) {
      if (wants_max) {
        for (float& x : raw) x = -kInfinity;
      }
      const int64_t block_end = least((j + 1) * s.block_size, end);
      for (int64_t start = j * s.block_size; start < block_end; start += kPiece) {
        const int64_t n = least(kPiece, block_end - start);
        int64_t i = 0;
        while (valid(i, start, n) == 0) ++i;  // causal: earlier queries see nothing here
        rows_of(pack(j, start, n, valid(i, start, n)), i, start, wants_max ? raw : nullptr);
      }
      if (wants_max) store_max(j, raw);
    }
  }

  void rows_of(const PieceValues<Isa>& v, int64_t first_query, int64_t start, float* raw) const {
    for (int64_t r0 = first_query * group; r0 < nq * group; r0 += Isa::kChunk) {
      const int64_t rows = least(Isa::kChunk, nq * group - r0);
      int32_t row[Isa::kChunk], seen[Isa::kChunk];
      for (int64_t r = 0; r < rows; ++r) {
        row[r] = static_cast<int32_t>(r0 + r);
        seen[r] = valid((r0 + r) / group, start, v.n);
      }
      attend_chunk<Isa>(w, v, w.a + r0 * w.lda, rows, row, seen, c, raw);
    }
  }

  void store_max(int64_t j, const float* raw) const {
    for (int64_t r = 0; r < nq * group; ++r) {
      *call.block_max.at<float>(head * group + r % group, s.q_begin + q0 + r / group, j) = raw[r];
    }
  }

  /// The blocks in slots [slot0,slot1) of each query's list.
  void sparse(int64_t slot0, int64_t slot1) const {
    const int64_t pairs = tile_lists(*call.ids, head, s, q0, nq, slot0, slot1, w.pairs);
    for (int64_t begin = 0, stop = 0; begin < pairs; begin = stop) {
      const int64_t j = w.pairs[begin] >> 32;
      while (stop < pairs && w.pairs[stop] >> 32 == j) ++stop;
      const int64_t first = w.pairs[begin] & 0xffffffff, last = w.pairs[stop - 1] & 0xffffffff;
      const int64_t block_end = least((j + 1) * s.block_size, s.visible(q0 + last));
      for (int64_t start = j * s.block_size; start < block_end; start += kPiece) {
        const int64_t n = least(kPiece, block_end - start);
        gather_rows(pack(j, start, n, valid(first, start, n)), w.pairs + begin,
                    (stop - begin) * group, start);
      }
    }
  }

  void gather_rows(const PieceValues<Isa>& v, const int64_t* pairs, int64_t total,
                   int64_t start) const {
    for (int64_t r0 = 0; r0 < total; r0 += Isa::kChunk) {
      const int64_t rows = least(Isa::kChunk, total - r0);
      int32_t row[Isa::kChunk], seen[Isa::kChunk];
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t query = pairs[(r0 + r) / group] & 0xffffffff;
        row[r] = static_cast<int32_t>(query * group + (r0 + r) % group);
        seen[r] = valid(query, start, v.n);
        std::memcpy(w.gathered + r * w.lda, w.a + row[r] * w.lda,
                    static_cast<size_t>(w.lda) * sizeof(*w.a));
      }
      attend_chunk<Isa>(w, v, w.gathered, rows, row, seen, c, nullptr);
    }
  }

  /// Normalises and writes rows to o [T,Hq,D] and lse (given or not).
  void finish(const TensorView& o, const TensorView& lse) const {
    const int64_t dim = call.q.shape[2];
    for (int64_t r = 0; r < nq * group; ++r) {
      const int64_t token = s.q_begin + q0 + r / group, h = head * group + r % group;
      const float l = w.l[r];
      std::byte* out = static_cast<std::byte*>(o.data) + o.offset(token, h) * size_of(o.dtype);
      const float inverse = l == 0.0f ? 0.0f : 1.0f / l;
      const float* x = w.o + r * w.ldo;
      if (o.dtype == DType::kF32) {
        store_row<Isa, DType::kF32>(x, inverse, dim, out);
      } else if (o.dtype == DType::kBF16) {
        store_row<Isa, DType::kBF16>(x, inverse, dim, out);
      } else {
        store_row<Isa, DType::kF16>(x, inverse, dim, out);
      }
      if (lse.given()) *lse.at<float>(token, h) = lse_of(w.m[r], l, c);
    }
  }
};

/// Rows of q past the last sequence: zeros, LSE -inf, maxima -inf.
template <class Isa>
void fill_padding(const AttentionCall& call) {
  const int64_t used = *call.batch.cu_seqlens_q.at<const int32_t>(batch_size(call.batch));
  for (int64_t t = used; t < call.q.shape[0]; ++t) {
    for (int64_t h = 0; h < call.q.shape[1]; ++h) {
      std::memset(
          static_cast<std::byte*>(call.o.data) + call.o.offset(t, h) * size_of(call.o.dtype), 0,
          static_cast<size_t>(call.o.shape[2] * size_of(call.o.dtype)));
      if (call.lse.given()) *call.lse.at<float>(t, h) = -kInfinity;
    }
  }
}

/// Views of partial results in the workspace: o [splits,T,Hq,D] and lse [splits,T,Hq], f32.
struct Partials {
  TensorView o, lse;
  MSA_INLINE Partials(Arena& arena, int64_t splits, int64_t tokens, int64_t heads, int64_t dim)
      : o(TensorView::contiguous(arena.take<float>(splits * tokens * heads * dim), DType::kF32,
                                 {splits, tokens, heads, dim})),
        lse(TensorView::contiguous(arena.take<float>(splits * tokens * heads), DType::kF32,
                                   {splits, tokens, heads})) {}
};

MSA_INLINE TensorView part(const TensorView& view, int64_t i) {
  TensorView out = view;
  out.data = view.at<float>(i);
  out.rank = view.rank - 1;
  for (size_t axis = 1; axis < static_cast<size_t>(view.rank); ++axis) {
    out.shape[axis - 1] = view.shape[axis];
    out.stride[axis - 1] = view.stride[axis];
  }
  return out;
}

template <class Isa>
int64_t attention_bytes(const Problem& problem, const Limits& limits, bool sparse) {
  const AttentionShape shape(problem, limits, sparse);
  Arena worker(nullptr), shared(nullptr);
  AttentionScratch<Isa>(worker, problem, shape.tile_q, sparse);
  if (shape.splits > 1)
    Partials(shared, shape.splits, limits.max_tokens, problem.heads_q, problem.head_dim);
  return shared.used() + worker.used() * limits.max_threads;
}

template <class Isa>
void run_attention(const Plan& plan, const AttentionCall& call, Workspace workspace, Queue queue) {
  const Problem& p = plan.problem;
  const bool sparse = call.ids != nullptr;
  const AttentionShape shape(p, plan.limits, sparse);
  const int64_t batch = batch_size(call.batch);
  const int64_t tiles = tiles_of(call.batch, shape.tile_q);

  auto* memory = static_cast<std::byte*>(workspace.data);
  Arena shared(memory), one(nullptr);
  const bool split = shape.splits > 1;
  const int64_t limit = split ? plan.limits.max_tokens : 0;
  const Partials partials(shared, shape.splits, limit, p.heads_q, p.head_dim);
  AttentionScratch<Isa>(one, p, shape.tile_q, sparse);
  const float scale =
      call.scale == 0 ? 1.0f / std::sqrt(static_cast<float>(p.head_dim)) : call.scale;

  for_each_task(queue, tiles * batch * p.heads_kv * shape.splits, [&](int64_t task, int worker) {
    const int64_t i = task % shape.splits, head = task / shape.splits % p.heads_kv;
    const int64_t b = task / (shape.splits * p.heads_kv) % batch;
    const int64_t tile =
        tiles - 1 - task / (shape.splits * p.heads_kv * batch);  // the longest first
    const Sequence s = sequence(call.batch, b, p.block_size);
    const int64_t q0 = tile * shape.tile_q;
    if (q0 >= s.q_len) return;
    Arena arena(memory + shared.used() + worker * one.used());
    const AttentionScratch<Isa> w(arena, p, shape.tile_q, sparse);
    const AttentionTile<Isa> work{
        call, s, head, q0, least(shape.tile_q, s.q_len - q0), p.group(), w, scale * kLog2E};
    Isa::begin();
    work.begin();
    if (sparse) {
      work.sparse(i * p.topk / shape.splits, (i + 1) * p.topk / shape.splits);
    } else if (split) {
      const int64_t blocks = (kSplitKeys + p.block_size - 1) / p.block_size;
      work.dense(i * blocks, (i + 1) * blocks);
    } else {
      work.dense(0, s.blocks());
    }
    Isa::end();
    split ? work.finish(part(partials.o, i), part(partials.lse, i)) : work.finish(call.o, call.lse);
  });
  if (split) {
    MergeParams parts{
        .o_parts = partials.o, .lse_parts = partials.lse, .o = call.o, .lse = call.lse};
    parts.o_parts.shape[1] = parts.lse_parts.shape[1] =
        *call.batch.cu_seqlens_q.at<const int32_t>(batch);
    merge(plan, parts, {}, queue);
  }
  fill_padding<Isa>(call);
}

/// exp(S scale - lse) summed over the keys of each block, mean over the group.
template <class Isa>
void run_block_mass(const Plan& plan, const BlockMassParams& params, Workspace workspace,
                    Queue queue) {
  const Problem& p = plan.problem;
  const AttentionShape shape(p, plan.limits, false);
  const int64_t batch = batch_size(params.batch), group = p.group();
  Arena one(nullptr);
  AttentionScratch<Isa>(one, p, shape.tile_q, false);
  const float scale = params.softmax_scale == 0 ? 1.0f / std::sqrt(static_cast<float>(p.head_dim))
                                                : params.softmax_scale;

  for (int64_t h = 0; h < p.heads_kv; ++h) {
    for (int64_t t = 0; t < params.q.shape[0]; ++t) {
      for (int64_t j = 0; j < params.mass.shape[2]; ++j) *params.mass.at<float>(h, t, j) = 0;
    }
  }
  const int64_t tiles = tiles_of(params.batch, shape.tile_q);
  for_each_task(queue, tiles * batch * p.heads_kv, [&](int64_t task, int worker) {
    const int64_t head = task % p.heads_kv, b = task / p.heads_kv % batch;
    const int64_t q0 = (tiles - 1 - task / (p.heads_kv * batch)) * shape.tile_q;
    const Sequence s = sequence(params.batch, b, p.block_size);
    if (q0 >= s.q_len) return;
    const int64_t nq = least(shape.tile_q, s.q_len - q0);
    Arena arena(static_cast<std::byte*>(workspace.data) + worker * one.used());
    const AttentionScratch<Isa> w(arena, p, shape.tile_q, false);
    Isa::begin();
    load_queries<Isa>(params.q, s.q_begin + q0, nq, head * group, group, w.a, w.lda);
    const int64_t end = s.visible(q0 + nq - 1);
    for (int64_t start = 0; start < end;) {
      const int64_t j = start / p.block_size;
      const int64_t n = least(kPiece, least((j + 1) * p.block_size, end) - start);
      BlockRows k = block_rows(params.k, s, j, head);
      k.data += (start - j * p.block_size) * k.token_stride * size_of(params.k.dtype);
      pack_keys<Isa>(params.k.dtype, k, n, p.head_dim, w.k_panels);
      for (int64_t r0 = 0; r0 < nq * group; r0 += Isa::kChunk) {
        const int64_t rows = least(Isa::kChunk, nq * group - r0), cols = round_up(n, Isa::kCols);
        float* scores[Isa::kChunk];
        for (int64_t r = 0; r < rows; ++r) scores[r] = w.s + r * kPiece;
        gemm<Isa>(w.a + r0 * w.lda, w.lda, rows, w.k_panels, w.lda * Isa::kCols, w.lda, cols,
                  scores, kPiece, false);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t query = (r0 + r) / group, token = s.q_begin + q0 + query;
          const float lse = *params.lse.at<const float>(token, head * group + (r0 + r) % group);
          if (lse == -kInfinity) continue;
          hide_invisible(scores[r], most(0, least(s.visible(q0 + query) - start, n)), cols,
                         scale < 0 ? kInfinity : -kInfinity);
          const float c = scale * kLog2E;
          typename Isa::Vec sum = Isa::zero();
          const typename Isa::Vec factor = Isa::set1(c),
                                  shift = Isa::set1(probability_shift(lse, c, scores[r], cols));
          for (int64_t col = 0; col < cols; col += Isa::kLanes) {
            sum = Isa::add(sum, Isa::exp2(Isa::fma(Isa::load(scores[r] + col), factor, shift)));
          }
          *params.mass.at<float>(head, token, j) +=
              Isa::reduce_add(sum) / static_cast<float>(group);
        }
      }
      start += n;
    }
    Isa::end();
  });
}

template <class Isa>
void run_sparse_attention(const Plan& plan, const SparseAttentionParams& a, Workspace workspace,
                          Queue queue) {
  run_attention<Isa>(plan, {a.q, a.k, a.v, &a.block_ids, a.batch, a.softmax_scale, a.o, a.lse, {}},
                     workspace, queue);
}

template <class Isa>
void run_dense_attention(const Plan& plan, const DenseAttentionParams& a, Workspace workspace,
                         Queue queue) {
  if (a.block_max.given()) {  // every entry is written: -inf first, tiles fill in what is visible
    for (int64_t h = 0; h < a.block_max.shape[0]; ++h) {
      for (int64_t t = 0; t < a.block_max.shape[1]; ++t) {
        for (int64_t j = 0; j < a.block_max.shape[2]; ++j)
          *a.block_max.at<float>(h, t, j) = -kInfinity;
      }
    }
  }
  run_attention<Isa>(plan,
                     {a.q, a.k, a.v, nullptr, a.batch, a.softmax_scale, a.o, a.lse, a.block_max},
                     workspace, queue);
}

}  // namespace msa::cpu
