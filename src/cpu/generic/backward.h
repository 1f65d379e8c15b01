// Gradients of dense and sparse attention. For a query row i and a key j of its list,
//
//     P = exp2(c q_i . k_j - lse_i)   dS = P (d_o_i . v_j - delta_i) scale   delta_i = o_i . d_o_i
//
// in units of log2. Query side: dQ = dS K. Key side, on transposed tiles: dV = P^T dO, dK = dS^T Q.
#pragma once

#include "cpu/generic/training.h"

namespace msa::cpu {

/// What both sides read.
struct BackwardCall {
  const Problem& p;
  const AttentionBackwardParams& a;
  float scale;
  const float* delta;  ///< [T,Hq]

  MSA_INLINE float c() const { return scale * kLog2E; }
  MSA_INLINE float lse(int64_t token, int64_t h) const { return *a.lse.at<const float>(token, h); }
  MSA_INLINE float shift_of_dp(int64_t token, int64_t h) const {
    return -delta[token * p.heads_q + h] * scale;
  }
};

/// delta [T,Hq] of the real rows.
template <class Isa>
void write_delta(const AttentionBackwardParams& a, int64_t tokens, float* delta, Queue queue) {
  const int64_t heads = a.q.shape[1], dim = a.q.shape[2];
  for_each_task(queue, tokens, [&](int64_t t, int) {
    alignas(64) float o[kMaxHeadDim]{}, d_o[kMaxHeadDim]{};
    for (int64_t h = 0; h < heads; ++h) {
      load_row<Isa>(a.o, t, h, o);
      load_row<Isa>(a.d_o, t, h, d_o);
      typename Isa::Vec sum = Isa::zero();
      for (int64_t d = 0; d < dim; d += Isa::kLanes)
        sum = Isa::fma(Isa::load(o + d), Isa::load(d_o + d), sum);
      delta[t * heads + h] = Isa::reduce_add(sum);
    }
  });
}

// ---- the query side
// ------------------------------------------------------------------------------

/// One worker's memory.
template <class Isa>
struct BackwardQuerySide {
  int64_t ld, ldo;             // row lengths: D, and D in whole panels
  float *q, *d_o, *dq;         // [rows,ld] twice, [rows,ldo]: the tile's
  float *q_rows, *d_o_rows;    // [kChunk,ld]: those that read a piece
  float *k_cols, *v_cols, *k;  // panels of a piece: keys as columns, keys as depths
  float *s, *dp;               // [kChunk,kPiece]
  int64_t* list;               // [tile_q*K], [tile_q] for dense

  MSA_INLINE BackwardQuerySide(Arena& arena, const Problem& p, int64_t tile_q) {
    const bool sparse = p.op == Op::kSparseAttentionBackward;
    const int64_t rows = tile_q * p.group();
    ld = p.head_dim;
    ldo = round_up(ld, Isa::kCols);
    q = arena.take<float>(rows * ld);
    d_o = arena.take<float>(rows * ld);
    dq = arena.take<float>(rows * ldo);
    q_rows = arena.take<float>(Isa::kChunk * ld);
    d_o_rows = arena.take<float>(Isa::kChunk * ld);
    k_cols = arena.take<float>(kPiece * ld);
    v_cols = arena.take<float>(kPiece * ld);
    k = arena.take<float>(kPiece * ldo);
    s = arena.take<float>(Isa::kChunk * kPiece);
    dp = arena.take<float>(Isa::kChunk * kPiece);
    list = arena.take<int64_t>(tile_q * (sparse ? p.topk : 1));
  }
};

/// One row of S and dP: dP becomes dS, 0 from `valid` on.
template <class Isa>
MSA_INLINE void gradient_row(const float* s, float* dp, int64_t valid, int64_t cols, float c,
                             float shift, float scale, float shift_of_dp) {
  using Vec = typename Isa::Vec;
  const Vec c_all = Isa::set1(c), scale_all = Isa::set1(scale);
  const Vec shift_all = Isa::set1(shift), shift_of_dp_all = Isa::set1(shift_of_dp);
  for (int64_t col = 0; col < cols; col += Isa::kLanes) {
    const Vec p = Isa::exp2(Isa::fma(Isa::load(s + col), c_all, shift_all));
    Isa::store(dp + col, Isa::mul(p, Isa::fma(Isa::load(dp + col), scale_all, shift_of_dp_all)));
  }
  for (int64_t col = valid; col < cols; ++col) dp[col] = 0;
}

template <class Isa>
void write_dq(const BackwardCall& call, const Sequence& s, int64_t head, int64_t q0, int64_t nq,
              const BackwardQuerySide<Isa>& w) {
  const AttentionBackwardParams& a = call.a;
  const int64_t group = call.p.group(), first_head = head * group, token0 = s.q_begin + q0;
  for (int64_t r = 0; r < nq * group; ++r) {
    load_row<Isa>(a.q, token0 + r / group, first_head + r % group, w.q + r * w.ld);
    load_row<Isa>(a.d_o, token0 + r / group, first_head + r % group, w.d_o + r * w.ld);
  }
  std::memset(w.dq, 0, static_cast<size_t>(nq * group * w.ldo) * sizeof(float));
  for_each_piece(
      s, q0, nq, a.block_ids, head, w.list,
      [&](int64_t start, int64_t n, const int64_t* listed, int64_t count) {
        const BlockRows k = key_rows(a.k, s, start, head), v = key_rows(a.v, s, start, head);
        pack_keys<Isa>(a.k.dtype, k, n, w.ld, w.k_cols);
        pack_keys<Isa>(a.v.dtype, v, n, w.ld, w.v_cols);
        pack_values<Isa>(a.k.dtype, k, n, n, w.ld, w.k);
        const int64_t cols = round_up(n, Isa::kCols);
        for (int64_t r0 = 0; r0 < count * group; r0 += Isa::kChunk) {
          const int64_t rows = least(Isa::kChunk, count * group - r0);
          int64_t from[Isa::kChunk];
          float* dq[Isa::kChunk];
          for (int64_t r = 0; r < rows; ++r) {
            from[r] = query_of(listed[(r0 + r) / group]) * group + (r0 + r) % group;
            dq[r] = w.dq + from[r] * w.ldo;
            const auto bytes = static_cast<size_t>(w.ld) * sizeof(float);
            std::memcpy(w.q_rows + r * w.ld, w.q + from[r] * w.ld, bytes);
            std::memcpy(w.d_o_rows + r * w.ld, w.d_o + from[r] * w.ld, bytes);
          }
          product<Isa>(w.q_rows, w.ld, rows, w.k_cols, w.ld, cols, w.s, kPiece, false);
          product<Isa>(w.d_o_rows, w.ld, rows, w.v_cols, w.ld, cols, w.dp, kPiece, false);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t query = from[r] / group, token = token0 + query;
            const int64_t h = first_head + from[r] % group;
            const int64_t valid = most(0, least(s.visible(q0 + query) - start, n));
            const float shift =
                probability_shift(call.lse(token, h), call.c(), w.s + r * kPiece, cols);
            gradient_row<Isa>(w.s + r * kPiece, w.dp + r * kPiece, valid, cols, call.c(), shift,
                              call.scale, call.shift_of_dp(token, h));
          }
          gemm<Isa>(w.dp, kPiece, rows, w.k, n * Isa::kCols, n, w.ldo, dq, w.ldo, true);
        }
      });
  for (int64_t r = 0; r < nq * group; ++r)
    store_row<Isa>(a.dq, token0 + r / group, first_head + r % group, w.dq + r * w.ldo);
}

// ---- the key side
// --------------------------------------------------------------------------------

/// One worker's memory.
template <class Isa>
struct BackwardKeySide {
  int64_t ld, ldo;
  float *k, *v, *dk, *dv;              // [kPiece,ld] twice, [kPiece,ldo] twice: the piece's
  float* rows;                         // [kReaders,ld]
  float *q_cols, *d_o_cols, *q, *d_o;  // panels of readers: as columns, as depths
  float *s, *dp;                       // [kPiece,kReaders], keys down
  float *shift, *shift_of_dp;          // [kReaders]
  int64_t seen[kReaders];              // keys of the piece that a column sees, ascending

  MSA_INLINE BackwardKeySide(Arena& arena, const Problem& p) {
    ld = p.head_dim;
    ldo = round_up(ld, Isa::kCols);
    k = arena.take<float>(kPiece * ld);
    v = arena.take<float>(kPiece * ld);
    dk = arena.take<float>(kPiece * ldo);
    dv = arena.take<float>(kPiece * ldo);
    rows = arena.take<float>(kReaders * ld);
    q_cols = arena.take<float>(kReaders * ld);
    d_o_cols = arena.take<float>(kReaders * ld);
    q = arena.take<float>(kReaders * ldo);
    d_o = arena.take<float>(kReaders * ldo);
    s = arena.take<float>(kPiece * kReaders);
    dp = arena.take<float>(kPiece * kReaders);
    shift = arena.take<float>(kReaders);
    shift_of_dp = arena.take<float>(kReaders);
  }
};

/// S becomes P and dP becomes dS, for n keys and `cols` readers; 0 where a reader does not see a
/// key.
template <class Isa>
void gradient_tile(const BackwardKeySide<Isa>& w, int64_t n, int64_t cols, float c, float scale) {
  using Vec = typename Isa::Vec;
  const Vec c_all = Isa::set1(c), scale_all = Isa::set1(scale);
  int64_t blind = 0;  // readers that do not see the key
  for (int64_t key = 0; key < n; ++key) {
    float *s = w.s + key * kReaders, *dp = w.dp + key * kReaders;
    for (int64_t col = 0; col < cols; col += Isa::kLanes) {
      const Vec p = Isa::exp2(Isa::fma(Isa::load(s + col), c_all, Isa::load(w.shift + col)));
      const Vec ds = Isa::fma(Isa::load(dp + col), scale_all, Isa::load(w.shift_of_dp + col));
      Isa::store(s + col, p);
      Isa::store(dp + col, Isa::mul(p, ds));
    }
    while (blind < cols && w.seen[blind] <= key) ++blind;
    for (int64_t col = 0; col < blind; ++col) s[col] = dp[col] = 0;
  }
}

template <class Isa>
void write_dk_dv(const BackwardCall& call, const InverseLists& lists, const Sequence& s,
                 int64_t row, int64_t start, int64_t n, int64_t head, BackwardKeySide<Isa>& w) {
  const AttentionBackwardParams& a = call.a;
  const int64_t group = call.p.group(), first_head = head * group;
  for (int64_t key = 0; key < n; ++key) {
    load_row<Isa>(a.k, s.k_begin + start + key, head, w.k + key * w.ld);
    load_row<Isa>(a.v, s.k_begin + start + key, head, w.v + key * w.ld);
  }
  std::memset(w.dk, 0, static_cast<size_t>(n * w.ldo) * sizeof(float));
  std::memset(w.dv, 0, static_cast<size_t>(n * w.ldo) * sizeof(float));
  const Readers readers = readers_of(lists, s, head, row, start);
  for (int64_t c0 = 0; c0 < readers.count * group; c0 += kReaders) {
    const int64_t count = least(kReaders, readers.count * group - c0);
    const int64_t cols = round_up(count, Isa::kCols);
    for (int64_t col = 0; col < count; ++col) {
      const int64_t query = readers.query((c0 + col) / group), token = s.q_begin + query;
      const int64_t h = first_head + (c0 + col) % group;
      w.shift_of_dp[col] = call.shift_of_dp(token, h);
      w.seen[col] = s.visible(query) - start;
    }
    for (int64_t col = count; col < cols; ++col) {  // read, but in no product
      w.shift[col] = w.shift_of_dp[col] = 0;
      w.seen[col] = n;
    }
    const auto pack = [&](const TensorView& view, float* columns, float* depths) {
      for (int64_t col = 0; col < count; ++col)
        load_row<Isa>(view, s.q_begin + readers.query((c0 + col) / group),
                      first_head + (c0 + col) % group, w.rows + col * w.ld);
      pack_columns<Isa>(w.rows, w.ld, count, columns);
      pack_depths<Isa>(w.rows, w.ld, count, depths);
    };
    pack(a.q, w.q_cols, w.q);
    pack(a.d_o, w.d_o_cols, w.d_o);
    product<Isa>(w.k, w.ld, n, w.q_cols, w.ld, cols, w.s, kReaders, false);
    product<Isa>(w.v, w.ld, n, w.d_o_cols, w.ld, cols, w.dp, kReaders, false);
    for (int64_t col = 0; col < count; ++col) {
      const int64_t token = s.q_begin + readers.query((c0 + col) / group);
      const float lse = call.lse(token, first_head + (c0 + col) % group);
      w.shift[col] = probability_shift(lse, call.c(), w.s + col, n, kReaders);
    }
    gradient_tile<Isa>(w, n, cols, call.c(), call.scale);
    product<Isa>(w.s, kReaders, n, w.d_o, count, w.ldo, w.dv, w.ldo, true);
    product<Isa>(w.dp, kReaders, n, w.q, count, w.ldo, w.dk, w.ldo, true);
  }
  for (int64_t key = 0; key < n; ++key) {
    store_row<Isa>(a.dk, s.k_begin + start + key, head, w.dk + key * w.ldo);
    store_row<Isa>(a.dv, s.k_begin + start + key, head, w.dv + key * w.ldo);
  }
}

// ---- both
// ----------------------------------------------------------------------------------------

/// How a plan cuts the queries, and what all workers share.
struct BackwardShape {
  bool sparse;
  int64_t tile_q;
  MSA_INLINE BackwardShape(const Problem& p, const Limits& limits)
      : sparse(p.op == Op::kSparseAttentionBackward),
        tile_q(AttentionShape(p, limits, sparse).tile_q) {}
};

/// Memory of a worker: one side after the other.
template <class Isa>
int64_t backward_worker_bytes(const Problem& p, int64_t tile_q) {
  Arena query(nullptr), key(nullptr);
  BackwardQuerySide<Isa>(query, p, tile_q);
  BackwardKeySide<Isa>(key, p);
  return most(query.used(), key.used());
}

template <class Isa>
int64_t attention_backward_bytes(const Problem& p, const Limits& limits) {
  const BackwardShape shape(p, limits);
  Arena shared(nullptr);
  shared.take<float>(limits.max_tokens * p.heads_q);
  if (shape.sparse) take_lists(shared, p, limits);
  return shared.used() + limits.max_threads * backward_worker_bytes<Isa>(p, shape.tile_q);
}

template <class Isa>
void run_attention_backward(const Plan& plan, const AttentionBackwardParams& a, Workspace workspace,
                            Queue queue) {
  const Problem& p = plan.problem;
  const BackwardShape shape(p, plan.limits);
  const int64_t tokens = *a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch));
  Arena shared(static_cast<std::byte*>(workspace.data));
  float* delta = shared.take<float>(plan.limits.max_tokens * p.heads_q);
  const InverseLists lists(plan, a,
                           shape.sparse ? take_lists(shared, p, plan.limits) : ListMemory{}, queue);
  write_delta<Isa>(a, tokens, delta, queue);
  const float scale =
      a.softmax_scale == 0 ? 1.0f / std::sqrt(static_cast<float>(p.head_dim)) : a.softmax_scale;
  const BackwardCall call{p, a, scale, delta};
  const int64_t each = backward_worker_bytes<Isa>(p, shape.tile_q);
  std::byte* const first = static_cast<std::byte*>(workspace.data) + shared.used();

  for_each_query_tile(p, a.batch, shape.tile_q, queue,
                      [&](const Sequence& s, int64_t head, int64_t q0, int64_t nq, int worker) {
                        Arena arena(first + worker * each);
                        write_dq<Isa>(call, s, head, q0, nq,
                                      BackwardQuerySide<Isa>(arena, p, shape.tile_q));
                      });
  for_each_key_piece(
      p, a.batch, shape.sparse, p.heads_kv, queue,
      [&](const Sequence& s, int64_t row, int64_t start, int64_t n, int64_t head, int worker) {
        Arena arena(first + worker * each);
        BackwardKeySide<Isa> memory_of_keys(arena, p);
        write_dk_dv<Isa>(call, lists, s, row, start, n, head, memory_of_keys);
      });
  clear_rows(a.dq, tokens);
  const int64_t keys = *a.batch.cu_seqlens_k.at<const int32_t>(batch_size(a.batch));
  clear_rows(a.dk, keys);
  clear_rows(a.dv, keys);
}

}  // namespace msa::cpu
