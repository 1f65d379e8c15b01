// What the gradients of attention and of the KL loss have in common.
//
// Both meet every (query, key) pair twice, because the gradient of a query sums over keys and that
// of a key over queries:
//
//     query side   a tile of queries walks the pieces of keys that it reads, in ascending order;
//                  queries are rows of A, keys are panels
//     key side     a piece of keys walks its readers, the queries that read it, in ascending order
//                  (the inverse lists say which); keys are rows of A, queries are panels
//
// So every sum belongs to one task and has one order, whatever the number of threads. Computing the
// probabilities twice costs two products of seven, and saves the exchange of partial sums.
// Everything here is in f32: for instruction sets with kPair == 1.
#pragma once

#include "cpu/generic/attention.h"

namespace msa::cpu {

inline constexpr int64_t kReaders = 64;  // columns of a key side product: S and dP stay in L2

/// Row `row` of [N,H,dim] or [N,dim] as floats.
template <class Isa>
MSA_INLINE void load_row(const TensorView& view, int64_t row, int64_t head, float* out) {
  const bool has_heads = view.rank == 3;
  const int64_t offset = row * view.stride[0] + (has_heads ? head * view.stride[1] : 0);
  const int64_t dim = view.shape[has_heads ? 2 : 1];
  with_dtype<Isa>(view.dtype, [&]<DType T>() {
    load_query<Isa, T>(static_cast<const std::byte*>(view.data) + offset * size_of(T), dim, out);
  });
}

/// The way back; rows of x are padded to whole vectors.
template <class Isa>
MSA_INLINE void store_row(const TensorView& view, int64_t row, int64_t head, const float* x) {
  const bool has_heads = view.rank == 3;
  const int64_t offset = row * view.stride[0] + (has_heads ? head * view.stride[1] : 0);
  const int64_t dim = view.shape[has_heads ? 2 : 1];
  with_dtype<Isa>(view.dtype, [&]<DType T>() {
    store_row<Isa, T>(x, 1.0f, dim, static_cast<std::byte*>(view.data) + offset * size_of(T));
  });
}

/// Zeros in the rows of a gradient that belong to no sequence.
MSA_INLINE void clear_rows(const TensorView& view, int64_t begin) {
  const bool has_heads = view.rank == 3;
  const int64_t heads = has_heads ? view.shape[1] : 1, dim = view.shape[has_heads ? 2 : 1];
  for (int64_t row = begin; row < view.shape[0]; ++row) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t offset = row * view.stride[0] + (has_heads ? head * view.stride[1] : 0);
      std::memset(static_cast<std::byte*>(view.data) + offset * size_of(view.dtype), 0,
                  static_cast<size_t>(dim * size_of(view.dtype)));
    }
  }
}

/// Contiguous rows of floats as panels: as columns (a transpose), or one depth each.
template <class Isa>
MSA_INLINE void pack_columns(const float* rows, int64_t ld, int64_t n, float* panels) {
  pack_keys_as<Isa, DType::kF32>({reinterpret_cast<const std::byte*>(rows), ld}, n, ld, panels);
}
template <class Isa>
MSA_INLINE void pack_depths(const float* rows, int64_t ld, int64_t n, float* panels) {
  pack_values_as<Isa, DType::kF32>({reinterpret_cast<const std::byte*>(rows), ld}, n, n, ld,
                                   panels);
}

/// Keys start .. start+n-1 of a sequence, as pack_keys and pack_values take them.
MSA_INLINE BlockRows key_rows(const TensorView& keys, const Sequence& s, int64_t start,
                              int64_t head) {
  const int64_t offset =
      (s.k_begin + start) * keys.stride[0] + (keys.rank == 3 ? head * keys.stride[1] : 0);
  return {static_cast<const std::byte*>(keys.data) + offset * size_of(keys.dtype), keys.stride[0]};
}

/// c[r] = (add: +=) a[r] . panels for any number of rows, both with their leading dimensions.
template <class Isa>
MSA_INLINE void product(const float* a, int64_t lda, int64_t rows, const float* panels,
                        int64_t depth, int64_t cols, float* c, int64_t ldc, bool add) {
  for (int64_t r0 = 0; r0 < rows; r0 += Isa::kChunk) {
    const int64_t count = least(Isa::kChunk, rows - r0);
    float* out[Isa::kChunk];
    for (int64_t r = 0; r < count; ++r) out[r] = c + (r0 + r) * ldc;
    gemm<Isa>(a + r0 * lda, lda, count, panels, depth * Isa::kCols, depth, cols, out, ldc, add);
  }
}

// ---- the query side
// ------------------------------------------------------------------------------

MSA_INLINE int64_t query_of(int64_t listed) { return listed & 0xffffffff; }

/// visit(start, n, listed, count) for the pieces of keys that queries q0 .. q0+nq-1 read, with
/// those queries: query_of(listed[0..count)), counted from q0. memory: [nq * max(1,K)].
template <class Visit>
void for_each_piece(const Sequence& s, int64_t q0, int64_t nq, const TensorView& ids, int64_t head,
                    int64_t* memory, const Visit& visit) {
  const auto pieces = [&](int64_t begin, int64_t end, const int64_t* listed, int64_t count) {
    for (int64_t start = begin; start < end; start += kPiece) {
      for (; count > 0 && s.visible(q0 + query_of(*listed)) <= start; --count) ++listed;
      visit(start, least(kPiece, end - start), listed, count);
    }
  };
  if (!ids.given()) {
    for (int64_t i = 0; i < nq; ++i) memory[i] = i;
    return pieces(0, s.visible(q0 + nq - 1), memory, nq);
  }
  const int64_t pairs = tile_lists(ids, head, s, q0, nq, 0, ids.shape[2], memory);
  for (int64_t begin = 0, stop = 0; begin < pairs; begin = stop) {
    const int64_t j = memory[begin] >> 32;
    while (stop < pairs && memory[stop] >> 32 == j) ++stop;
    const int64_t seen = s.visible(q0 + query_of(memory[stop - 1]));
    pieces(j * s.block_size, least((j + 1) * s.block_size, seen), memory + begin, stop - begin);
  }
}

/// body(s, head, q0, nq, worker) for tiles of queries of one sequence and KV head, the longest
/// first.
template <class Body>
void for_each_query_tile(const Problem& p, const Batch& batch, int64_t tile_q, Queue queue,
                         const Body& body) {
  const int64_t tiles = tiles_of(batch, tile_q), sequences = batch_size(batch);
  for_each_task(queue, tiles * sequences * p.heads_kv, [&](int64_t task, int worker) {
    const Sequence s = sequence(batch, task / p.heads_kv % sequences, p.block_size);
    const int64_t q0 = (tiles - 1 - task / (p.heads_kv * sequences)) * tile_q;
    if (q0 < s.q_len) body(s, task % p.heads_kv, q0, least(tile_q, s.q_len - q0), worker);
  });
}

// ---- the key side
// --------------------------------------------------------------------------------

/// Memory for the lists that a caller did not bring.
struct ListMemory {
  int32_t* row_ptr = nullptr;
  int32_t* entries = nullptr;
};

MSA_INLINE ListMemory take_lists(Arena& arena, const Problem& p, const Limits& limits) {
  const int64_t blocks =
      limits.max_batch * ((limits.max_seqlen_k + p.block_size - 1) / p.block_size);
  ListMemory memory;
  memory.row_ptr = arena.take<int32_t>(p.heads_kv * (blocks + 1));
  memory.entries = arena.take<int32_t>(p.heads_kv * limits.max_tokens * p.topk);
  return memory;
}

/// Which queries read a block; without ids all that see it.
struct InverseLists {
  TensorView row_ptr{}, entries{};
  int64_t topk = 1;

  template <class Params>
  MSA_INLINE InverseLists(const Plan& plan, const Params& a, const ListMemory& memory,
                          Queue queue) {
    if (!a.block_ids.given()) return;
    topk = a.block_ids.shape[2];
    row_ptr = a.row_ptr, entries = a.entries;
    if (row_ptr.given()) return;
    int64_t blocks = 0;
    for (int64_t b = 0; b < batch_size(a.batch); ++b)
      blocks += sequence(a.batch, b, plan.problem.block_size).blocks();
    const int64_t heads = plan.problem.heads_kv, tokens = a.block_ids.shape[1];
    row_ptr = TensorView::contiguous(memory.row_ptr, DType::kI32, {heads, blocks + 1});
    entries = TensorView::contiguous(memory.entries, DType::kI32, {heads, tokens * topk});
    block_lists(
        plan, {.block_ids = a.block_ids, .batch = a.batch, .row_ptr = row_ptr, .entries = entries},
        {}, queue);
  }
};

/// The queries of a sequence that read one piece of its keys, ascending.
struct Readers {
  const int32_t* entries;  ///< null: all from `first` on
  int64_t first, count, topk, q_begin;

  MSA_INLINE int64_t query(int64_t i) const {
    return entries == nullptr ? first + i : entries[i] / topk - q_begin;
  }
};

MSA_INLINE Readers readers_of(const InverseLists& lists, const Sequence& s, int64_t head,
                              int64_t row, int64_t start) {
  Readers out{nullptr, 0, s.q_len, lists.topk, s.q_begin};
  if (lists.row_ptr.given()) {
    const int32_t* rows = lists.row_ptr.at<const int32_t>(head);
    out.entries = lists.entries.at<const int32_t>(head) + rows[row];
    out.count = rows[row + 1] - rows[row];
  }
  for (; out.count > 0 && s.visible(out.query(0)) <= start; --out.count) {
    if (out.entries == nullptr)
      ++out.first;
    else
      ++out.entries;
  }
  return out;
}

/// body(s, row, start, n, worker) for pieces of keys of one sequence; row: of the inverse lists.
/// Each piece comes `repeats` times, first those with the most readers: body gets which one it is.
template <class Body>
void for_each_key_piece(const Problem& p, const Batch& batch, bool listed, int64_t repeats,
                        Queue queue, const Body& body) {
  const int64_t block = listed ? p.block_size : kPiece;
  const int64_t per_block = (block + kPiece - 1) / kPiece, sequences = batch_size(batch);
  int64_t longest = 0;
  for (int64_t b = 0; b < sequences; ++b)
    longest = most(longest, sequence(batch, b, p.block_size).kv_len);
  const int64_t pieces = (longest + block - 1) / block * per_block;
  for_each_task(queue, pieces * sequences * repeats, [&](int64_t task, int worker) {
    const int64_t piece = task / (repeats * sequences), b = task / repeats % sequences;
    const Sequence s = sequence(batch, b, p.block_size);
    const int64_t j = piece / per_block, start = j * block + piece % per_block * kPiece;
    const int64_t n = least(kPiece, least((j + 1) * block, s.kv_len) - start);
    if (n <= 0) return;
    int64_t row = j;
    for (int64_t before = 0; before < b; ++before)
      row += sequence(batch, before, p.block_size).blocks();
    body(s, row, start, n, task % repeats, worker);
  });
}

}  // namespace msa::cpu
