// The index branch in training: the LSE of its logits, its KL loss and the gradients of that.
//
//     teacher P = mean over the G heads of exp2(c q . k - lse)      student Pi = exp2(c' q' . k' -
//     lse') dS = (Pi - P) factor,    kl = ln 2 sum P (log2 P - log2 Pi)
//
// in units of log2. Query side: dQ' = dS K' and kl. Key side, on transposed tiles, over all KV
// heads in turn since they share the index key: dK' = dS^T Q'.
#pragma once

#include <bit>

#include "cpu/generic/training.h"

namespace msa::cpu {

/// Queries of a tile; a caller may or may not bring lists.
MSA_INLINE int64_t training_tile(const Problem& p, const Limits& limits) {
  return AttentionShape(p, limits, /*sparse=*/true).tile_q;
}

MSA_INLINE float index_scale(const Problem& p) {
  return 1.0f / std::sqrt(static_cast<float>(p.index_dim));
}

// ---- LSE of the index logits
// ---------------------------------------------------------------------

/// One worker's memory.
template <class Isa>
struct IndexLseMemory {
  float *q, *rows, *k_cols, *s;  // [tile_q,Di], [kChunk,Di], a piece's panels, [kChunk,kPiece]
  float *m, *l;                  // [tile_q] running maximum and sum
  int64_t* list;                 // [tile_q*K]

  MSA_INLINE IndexLseMemory(Arena& arena, const Problem& p, int64_t tile_q) {
    q = arena.take<float>(tile_q * p.index_dim);
    rows = arena.take<float>(Isa::kChunk * p.index_dim);
    k_cols = arena.take<float>(kPiece * p.index_dim);
    s = arena.take<float>(Isa::kChunk * kPiece);
    m = arena.take<float>(tile_q);
    l = arena.take<float>(tile_q);
    list = arena.take<int64_t>(tile_q * p.topk);
  }
};

template <class Isa>
int64_t index_lse_worker_bytes(const Problem& p, int64_t tile_q) {
  Arena one(nullptr);
  IndexLseMemory<Isa>(one, p, tile_q);
  return one.used();
}

template <class Isa>
int64_t index_lse_bytes(const Problem& p, const Limits& limits) {
  return limits.max_threads * index_lse_worker_bytes<Isa>(p, training_tile(p, limits));
}

template <class Isa>
void run_index_lse(const Plan& plan, const IndexLseParams& a, Workspace workspace, Queue queue) {
  const Problem& p = plan.problem;
  const int64_t tile_q = training_tile(p, plan.limits), dim = p.index_dim;
  const int64_t each = index_lse_worker_bytes<Isa>(p, tile_q);
  const float c = index_scale(p) * kLog2E;
  for_each_query_tile(
      p, a.batch, tile_q, queue,
      [&](const Sequence& s, int64_t head, int64_t q0, int64_t nq, int worker) {
        Arena arena(static_cast<std::byte*>(workspace.data) + worker * each);
        const IndexLseMemory<Isa> w(arena, p, tile_q);
        for (int64_t i = 0; i < nq; ++i) {
          load_row<Isa>(a.q_idx, s.q_begin + q0 + i, head, w.q + i * dim);
          w.m[i] = -kInfinity;
          w.l[i] = 0;
        }
        for_each_piece(s, q0, nq, a.block_ids, head, w.list,
                       [&](int64_t start, int64_t n, const int64_t* listed, int64_t count) {
                         pack_keys<Isa>(a.k_idx.dtype, key_rows(a.k_idx, s, start, 0), n, dim,
                                        w.k_cols);
                         const int64_t cols = round_up(n, Isa::kCols);
                         for (int64_t r0 = 0; r0 < count; r0 += Isa::kChunk) {
                           const int64_t rows = least(Isa::kChunk, count - r0);
                           for (int64_t r = 0; r < rows; ++r)
                             std::memcpy(w.rows + r * dim, w.q + query_of(listed[r0 + r]) * dim,
                                         static_cast<size_t>(dim) * sizeof(float));
                           product<Isa>(w.rows, dim, rows, w.k_cols, dim, cols, w.s, kPiece, false);
                           for (int64_t r = 0; r < rows; ++r) {
                             const int64_t query = query_of(listed[r0 + r]);
                             const int64_t valid = most(0, least(s.visible(q0 + query) - start, n));
                             float* row = w.s + r * kPiece;
                             softmax_row<Isa>(row, row, valid, cols, c, w.m[query], w.l[query],
                                              nullptr, 0, nullptr);
                           }
                         }
                       });
        for (int64_t i = 0; i < nq; ++i)
          *a.lse.at<float>(s.q_begin + q0 + i, head) = lse_of(w.m[i], w.l[i], c);
      });
  for (int64_t t = *a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch)); t < a.lse.shape[0];
       ++t)
    for (int64_t head = 0; head < p.heads_kv; ++head) *a.lse.at<float>(t, head) = -kInfinity;
}

// ---- the KL loss
// ---------------------------------------------------------------------------------

/// What both sides read.
struct KlCall {
  const Problem& p;
  const KlParams& a;
  float c, c_index;  ///< factors of the products, in units of log2
  float factor;      ///< of student - teacher

  MSA_INLINE KlCall(const Problem& problem, const KlParams& params)
      : p(problem), a(params), c_index(index_scale(problem) * kLog2E) {
    c = kLog2E *
        (a.softmax_scale == 0 ? 1.0f / std::sqrt(static_cast<float>(p.head_dim)) : a.softmax_scale);
    const int32_t queries = *a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch));
    factor = index_scale(p) / (static_cast<float>(queries) * static_cast<float>(p.heads_kv));
  }
  /// What products of a row need to become log2 of probabilities.
  MSA_INLINE float shift_of_student(int64_t token, int64_t head, float* s, int64_t n,
                                    int64_t step = 1) const {
    return probability_shift(*a.index_lse.at<const float>(token, head), c_index, s, n, step);
  }
  /// Likewise, of a head's share in the mean; a row without a student has no teacher.
  MSA_INLINE float shift_of_teacher(int64_t token, int64_t h, float* s, int64_t n,
                                    int64_t step = 1) const {
    if (*a.index_lse.at<const float>(token, h / p.group()) == -kInfinity) return -kInfinity;
    return probability_shift(*a.lse.at<const float>(token, h), c, s, n, step) -
           std::log2(static_cast<float>(p.group()));
  }
};

/// log2 of a normal positive number, relative error 1e-7 of the larger of result and 1: mantissa in
/// [sqrt(1/2), sqrt(2)], series of 2 atanh((m-1)/(m+1)). A loop over it becomes vector code.
MSA_INLINE float log2_of(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t exponent = (bits - 0x3f3504f3) >> 23;
  const auto m = std::bit_cast<float>(bits - (exponent << 23));
  const float t = (m - 1) / (m + 1), t2 = t * t;
  const float series =
      1 + t2 * (0.333333333f + t2 * (0.2f + t2 * (0.142857143f + t2 * 0.111111111f)));
  return static_cast<float>(exponent) + 2.88539008f * t * series;
}

/// Sum of P (log2 P - log2 Pi) over `valid` columns: teacher [cols], products z of the student.
/// terms: [cols].
template <class Isa>
MSA_INLINE float divergence(const float* teacher, const float* z, int64_t valid, int64_t cols,
                            float c, float shift, float* terms) {
  for (int64_t col = 0; col < cols; ++col) {
    const float p = teacher[col];
    const float term = p * (log2_of(p) - (z[col] * c + shift));
    terms[col] = p != 0 && col < valid ? term : 0;  // NaN stays
  }
  typename Isa::Vec sum = Isa::zero();
  for (int64_t col = 0; col < cols; col += Isa::kLanes) sum = Isa::add(sum, Isa::load(terms + col));
  return Isa::reduce_add(sum);
}

/// One worker's memory on the query side.
template <class Isa>
struct KlQuerySide {
  int64_t ldo;                         // Di in whole panels
  float *q, *q_idx, *dq, *kl;          // the tile's: [nq*G,D], [nq,Di], [nq,ldo], [nq]
  float* rows;                         // [kChunk,max(D,Di)]: those that read a piece
  float *k_cols, *k_idx_cols, *k_idx;  // panels of a piece
  float *s, *teacher;                  // [kChunk,kPiece]
  int64_t* list;                       // [tile_q*K]

  MSA_INLINE KlQuerySide(Arena& arena, const Problem& p, int64_t tile_q) {
    ldo = round_up(p.index_dim, Isa::kCols);
    q = arena.take<float>(tile_q * p.group() * p.head_dim);
    q_idx = arena.take<float>(tile_q * p.index_dim);
    dq = arena.take<float>(tile_q * ldo);
    kl = arena.take<float>(tile_q);
    rows = arena.take<float>(Isa::kChunk * most(p.head_dim, p.index_dim));
    k_cols = arena.take<float>(kPiece * p.head_dim);
    k_idx_cols = arena.take<float>(kPiece * p.index_dim);
    k_idx = arena.take<float>(kPiece * ldo);
    s = arena.take<float>(Isa::kChunk * kPiece);
    teacher = arena.take<float>(Isa::kChunk * kPiece);
    list = arena.take<int64_t>(tile_q * p.topk);
  }
};

/// teacher [rows,cols] of the queries listed[0..rows) and the packed piece.
template <class Isa>
void teach_rows(const KlCall& call, const int64_t* listed, int64_t rows, int64_t cols,
                int64_t token0, int64_t head, const KlQuerySide<Isa>& w) {
  using Vec = typename Isa::Vec;
  const int64_t group = call.p.group(), dim = call.p.head_dim;
  const Vec c = Isa::set1(call.c);
  for (int64_t g = 0; g < group; ++g) {
    for (int64_t r = 0; r < rows; ++r)
      std::memcpy(w.rows + r * dim, w.q + (query_of(listed[r]) * group + g) * dim,
                  static_cast<size_t>(dim) * sizeof(float));
    product<Isa>(w.rows, dim, rows, w.k_cols, dim, cols, w.s, kPiece, false);
    for (int64_t r = 0; r < rows; ++r) {
      float *s = w.s + r * kPiece, *teacher = w.teacher + r * kPiece;
      const Vec shift =
          Isa::set1(call.shift_of_teacher(token0 + query_of(listed[r]), head * group + g, s, cols));
      for (int64_t col = 0; col < cols; col += Isa::kLanes) {
        const Vec p = Isa::exp2(Isa::fma(Isa::load(s + col), c, shift));
        Isa::store(teacher + col, g == 0 ? p : Isa::add(Isa::load(teacher + col), p));
      }
    }
  }
}

template <class Isa>
void write_dq_idx(const KlCall& call, const Sequence& s, int64_t head, int64_t q0, int64_t nq,
                  const KlQuerySide<Isa>& w) {
  using Vec = typename Isa::Vec;
  const KlParams& a = call.a;
  const bool gradients = a.dq_idx.given(), loss = a.kl.given();
  const int64_t group = call.p.group(), dim = call.p.index_dim, token0 = s.q_begin + q0;
  for (int64_t i = 0; i < nq; ++i) {
    for (int64_t g = 0; g < group; ++g)
      load_row<Isa>(a.q, token0 + i, head * group + g, w.q + (i * group + g) * call.p.head_dim);
    load_row<Isa>(a.q_idx, token0 + i, head, w.q_idx + i * dim);
    w.kl[i] = 0;
  }
  std::memset(w.dq, 0, static_cast<size_t>(nq * w.ldo) * sizeof(float));
  for_each_piece(
      s, q0, nq, a.block_ids, head, w.list,
      [&](int64_t start, int64_t n, const int64_t* listed, int64_t count) {
        const BlockRows k_idx = key_rows(a.k_idx, s, start, 0);
        pack_keys<Isa>(a.k.dtype, key_rows(a.k, s, start, head), n, call.p.head_dim, w.k_cols);
        pack_keys<Isa>(a.k_idx.dtype, k_idx, n, dim, w.k_idx_cols);
        if (gradients) pack_values<Isa>(a.k_idx.dtype, k_idx, n, n, dim, w.k_idx);
        const int64_t cols = round_up(n, Isa::kCols);
        for (int64_t r0 = 0; r0 < count; r0 += Isa::kChunk, listed += Isa::kChunk) {
          const int64_t rows = least(Isa::kChunk, count - r0);
          teach_rows<Isa>(call, listed, rows, cols, token0, head, w);
          float* dq[Isa::kChunk];
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t query = query_of(listed[r]);
            dq[r] = w.dq + query * w.ldo;
            std::memcpy(w.rows + r * dim, w.q_idx + query * dim,
                        static_cast<size_t>(dim) * sizeof(float));
          }
          product<Isa>(w.rows, dim, rows, w.k_idx_cols, dim, cols, w.s, kPiece, false);
          for (int64_t r = 0; r < rows; ++r) {
            const int64_t query = query_of(listed[r]);
            const int64_t valid = most(0, least(s.visible(q0 + query) - start, n));
            float *z = w.s + r * kPiece, *teacher = w.teacher + r * kPiece;
            const float shift = call.shift_of_student(token0 + query, head, z, cols);
            if (loss) {
              alignas(64) float terms[kPiece];
              w.kl[query] += divergence<Isa>(teacher, z, valid, cols, call.c_index, shift, terms);
            }
            const Vec c = Isa::set1(call.c_index), shift_all = Isa::set1(shift);
            const Vec factor = Isa::set1(call.factor), minus = Isa::set1(-call.factor);
            for (int64_t col = 0; col < cols; col += Isa::kLanes) {
              const Vec student = Isa::exp2(Isa::fma(Isa::load(z + col), c, shift_all));
              Isa::store(z + col,
                         Isa::fma(student, factor, Isa::mul(Isa::load(teacher + col), minus)));
            }
            for (int64_t col = valid; col < cols; ++col) z[col] = 0;
          }
          if (gradients)
            gemm<Isa>(w.s, kPiece, rows, w.k_idx, n * Isa::kCols, n, w.ldo, dq, w.ldo, true);
        }
      });
  for (int64_t i = 0; i < nq; ++i) {
    if (gradients) store_row<Isa>(a.dq_idx, token0 + i, head, w.dq + i * w.ldo);
    if (loss) *a.kl.at<float>(token0 + i, head) = w.kl[i] * kLn2;
  }
}

/// One worker's memory on the key side.
template <class Isa>
struct KlKeySide {
  int64_t ldo;
  float *k, *k_idx, *dk;               // the piece's: [kPiece,D], [kPiece,Di], [kPiece,ldo]
  float* rows;                         // [kReaders,max(D,Di)]
  float *q_cols, *q_idx_cols, *q_idx;  // panels of readers: as columns, as depths
  float *s, *teacher;                  // [kPiece,kReaders], keys down
  float* shift;                        // [kReaders]
  int64_t seen[kReaders];              // keys of the piece that a column sees, ascending

  MSA_INLINE KlKeySide(Arena& arena, const Problem& p) {
    ldo = round_up(p.index_dim, Isa::kCols);
    k = arena.take<float>(kPiece * p.head_dim);
    k_idx = arena.take<float>(kPiece * p.index_dim);
    dk = arena.take<float>(kPiece * ldo);
    rows = arena.take<float>(kReaders * most(p.head_dim, p.index_dim));
    q_cols = arena.take<float>(kReaders * p.head_dim);
    q_idx_cols = arena.take<float>(kReaders * p.index_dim);
    q_idx = arena.take<float>(kReaders * ldo);
    s = arena.take<float>(kPiece * kReaders);
    teacher = arena.take<float>(kPiece * kReaders);
    shift = arena.take<float>(kReaders);
  }
};

/// teacher [n,cols] of the piece's keys and the readers c0 .. c0+count-1.
template <class Isa>
void teach_tile(const KlCall& call, const Readers& readers, int64_t c0, int64_t count, int64_t cols,
                int64_t n, int64_t head, const KlKeySide<Isa>& w) {
  using Vec = typename Isa::Vec;
  const int64_t group = call.p.group(), dim = call.p.head_dim;
  const Vec c = Isa::set1(call.c);
  for (int64_t h = head * group; h < (head + 1) * group; ++h) {
    for (int64_t col = 0; col < count; ++col) {
      const int64_t token = readers.q_begin + readers.query(c0 + col);
      load_row<Isa>(call.a.q, token, h, w.rows + col * dim);
    }
    pack_columns<Isa>(w.rows, dim, count, w.q_cols);
    product<Isa>(w.k, dim, n, w.q_cols, dim, cols, w.s, kReaders, false);
    for (int64_t col = 0; col < count; ++col) {
      const int64_t token = readers.q_begin + readers.query(c0 + col);
      w.shift[col] = call.shift_of_teacher(token, h, w.s + col, n, kReaders);
    }
    for (int64_t col = count; col < cols; ++col) w.shift[col] = -kInfinity;  // in no product
    for (int64_t i = 0; i < n * kReaders; i += kReaders) {
      for (int64_t col = 0; col < cols; col += Isa::kLanes) {
        const Vec p = Isa::exp2(Isa::fma(Isa::load(w.s + i + col), c, Isa::load(w.shift + col)));
        float* teacher = w.teacher + i + col;
        Isa::store(teacher, h == head * group ? p : Isa::add(Isa::load(teacher), p));
      }
    }
  }
}

/// The products of the student become dS, 0 where a reader does not see a key.
template <class Isa>
void learn_tile(const KlCall& call, int64_t n, int64_t cols, const KlKeySide<Isa>& w) {
  using Vec = typename Isa::Vec;
  const Vec c = Isa::set1(call.c_index);
  const Vec factor = Isa::set1(call.factor), minus = Isa::set1(-call.factor);
  int64_t blind = 0;
  for (int64_t key = 0; key < n; ++key) {
    float *z = w.s + key * kReaders, *teacher = w.teacher + key * kReaders;
    for (int64_t col = 0; col < cols; col += Isa::kLanes) {
      const Vec student = Isa::exp2(Isa::fma(Isa::load(z + col), c, Isa::load(w.shift + col)));
      Isa::store(z + col, Isa::fma(student, factor, Isa::mul(Isa::load(teacher + col), minus)));
    }
    while (blind < cols && w.seen[blind] <= key) ++blind;
    for (int64_t col = 0; col < blind; ++col) z[col] = 0;
  }
}

template <class Isa>
void write_dk_idx(const KlCall& call, const InverseLists& lists, const Sequence& s, int64_t row,
                  int64_t start, int64_t n, KlKeySide<Isa>& w) {
  const KlParams& a = call.a;
  const int64_t dim = call.p.index_dim;
  for (int64_t key = 0; key < n; ++key)
    load_row<Isa>(a.k_idx, s.k_begin + start + key, 0, w.k_idx + key * dim);
  std::memset(w.dk, 0, static_cast<size_t>(n * w.ldo) * sizeof(float));
  for (int64_t head = 0; head < call.p.heads_kv; ++head) {
    for (int64_t key = 0; key < n; ++key)
      load_row<Isa>(a.k, s.k_begin + start + key, head, w.k + key * call.p.head_dim);
    const Readers readers = readers_of(lists, s, head, row, start);
    for (int64_t c0 = 0; c0 < readers.count; c0 += kReaders) {
      const int64_t count = least(kReaders, readers.count - c0);
      const int64_t cols = round_up(count, Isa::kCols);
      teach_tile<Isa>(call, readers, c0, count, cols, n, head, w);
      for (int64_t col = 0; col < count; ++col) {
        const int64_t query = readers.query(c0 + col), token = s.q_begin + query;
        load_row<Isa>(a.q_idx, token, head, w.rows + col * dim);
        w.seen[col] = s.visible(query) - start;
      }
      for (int64_t col = count; col < cols; ++col) w.seen[col] = n;
      pack_columns<Isa>(w.rows, dim, count, w.q_idx_cols);
      pack_depths<Isa>(w.rows, dim, count, w.q_idx);
      product<Isa>(w.k_idx, dim, n, w.q_idx_cols, dim, cols, w.s, kReaders, false);
      for (int64_t col = 0; col < count; ++col) {
        const int64_t token = s.q_begin + readers.query(c0 + col);
        w.shift[col] = call.shift_of_student(token, head, w.s + col, n, kReaders);
      }
      learn_tile<Isa>(call, n, cols, w);
      product<Isa>(w.s, kReaders, n, w.q_idx, count, w.ldo, w.dk, w.ldo, true);
    }
  }
  for (int64_t key = 0; key < n; ++key)
    store_row<Isa>(a.dk_idx, s.k_begin + start + key, 0, w.dk + key * w.ldo);
}

/// Memory of a worker: one side after the other.
template <class Isa>
int64_t kl_worker_bytes(const Problem& p, int64_t tile_q) {
  Arena query(nullptr), key(nullptr);
  KlQuerySide<Isa>(query, p, tile_q);
  KlKeySide<Isa>(key, p);
  return most(query.used(), key.used());
}

template <class Isa>
int64_t kl_bytes(const Problem& p, const Limits& limits) {
  Arena shared(nullptr);
  if (p.op == Op::kKlBackward) take_lists(shared, p, limits);
  return shared.used() + limits.max_threads * kl_worker_bytes<Isa>(p, training_tile(p, limits));
}

template <class Isa>
void run_kl(const Plan& plan, const KlParams& a, Workspace workspace, Queue queue) {
  const Problem& p = plan.problem;
  const KlCall call(p, a);
  const int64_t tile_q = training_tile(p, plan.limits), each = kl_worker_bytes<Isa>(p, tile_q);
  const int64_t tokens = *a.batch.cu_seqlens_q.at<const int32_t>(batch_size(a.batch));
  const bool gradients = p.op == Op::kKlBackward;
  Arena shared(static_cast<std::byte*>(workspace.data));
  const ListMemory memory = gradients ? take_lists(shared, p, plan.limits) : ListMemory{};
  std::byte* const first = static_cast<std::byte*>(workspace.data) + shared.used();

  for_each_query_tile(p, a.batch, tile_q, queue,
                      [&](const Sequence& s, int64_t head, int64_t q0, int64_t nq, int worker) {
                        Arena arena(first + worker * each);
                        write_dq_idx<Isa>(call, s, head, q0, nq,
                                          KlQuerySide<Isa>(arena, p, tile_q));
                      });
  if (a.kl.given()) clear_rows(a.kl, tokens);
  if (!gradients) return;
  const InverseLists lists(plan, a, memory, queue);
  for_each_key_piece(
      p, a.batch, a.block_ids.given(), 1, queue,
      [&](const Sequence& s, int64_t row, int64_t start, int64_t n, int64_t, int worker) {
        Arena arena(first + worker * each);
        KlKeySide<Isa> memory_of_keys(arena, p);
        write_dk_idx<Isa>(call, lists, s, row, start, n, memory_of_keys);
      });
  clear_rows(a.dq_idx, tokens);
  clear_rows(a.dk_idx, *a.batch.cu_seqlens_k.at<const int32_t>(batch_size(a.batch)));
}

}  // namespace msa::cpu
