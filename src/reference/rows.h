// What the reference reads: rows of numbers, and the queries of a batch one by one.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/half.h"
#include "core/sequence.h"
#include "msa/backend.h"

namespace msa::reference {

struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};
inline float value(float x) { return x; }
inline float value(BF16 x) { return bf16_to_f32(x.bits); }
inline float value(F16 x) { return f16_to_f32(x.bits); }

/// The elements along the innermost axis of a tensor.
struct Row {
  const void* data;
  DType dtype;
};

template <class... Index>
Row row(const TensorView& view, Index... index) {
  return {static_cast<const std::byte*>(view.data) + view.offset(index...) * size_of(view.dtype),
          view.dtype};
}

/// Key or value of one token of `s`, counted from the first given one. Index keys: head 0.
inline Row key_row(const TensorView& keys, const Sequence& s, int64_t token, int64_t head) {
  const BlockRows block = block_rows(keys, s, token / s.block_size, head);
  return {block.data + token % s.block_size * block.token_stride * size_of(keys.dtype), keys.dtype};
}

/// visit(pointer to the row's elements in their own type)
template <class Visit>
auto with_elements(Row row, const Visit& visit) {
  switch (row.dtype) {
    case DType::kBF16:
      return visit(static_cast<const BF16*>(row.data));
    case DType::kF16:
      return visit(static_cast<const F16*>(row.data));
    default:
      return visit(static_cast<const float*>(row.data));
  }
}

/// a . b over n elements, in eight partial sums that a compiler can keep in a vector.
template <class Real>
Real dot(Row a, Row b, int64_t n) {
  const auto sum_of = [n](const auto* x, const auto* y) {
    const auto product = [&](int64_t d) {
      return static_cast<Real>(value(x[d])) * static_cast<Real>(value(y[d]));
    };
    Real partial[8] = {};
    int64_t d = 0;
    for (; d + 8 <= n; d += 8)
      for (int lane = 0; lane < 8; ++lane) partial[lane] += product(d + lane);
    Real sum = 0;
    for (; d < n; ++d) sum += product(d);
    for (Real lane : partial) sum += lane;
    return sum;
  };
  return with_elements(a, [&](const auto* x) {
    return with_elements(b, [&](const auto* y) { return sum_of(x, y); });
  });
}

/// sum[d] += weight * x[d]
template <class Real>
void add_scaled(Real* sum, Real weight, Row x, int64_t n) {
  with_elements(x, [&](const auto* elements) {
    for (int64_t d = 0; d < n; ++d) sum[d] += weight * static_cast<Real>(value(elements[d]));
  });
}

/// One query row. Rows past cu_seqlens_q[B] belong to an empty sequence, so they see nothing.
struct Query {
  Sequence s;
  int64_t i = 0;    ///< index in the sequence
  int64_t row = 0;  ///< index in the batch, 0 <= row < T

  int64_t position() const { return s.pos0 + i; }
  int64_t visible() const { return s.visible(i); }
  int64_t visible_blocks() const { return s.visible_blocks(i); }
  /// End of given block j's visible tokens.
  int64_t block_end(int64_t j) const { return std::min((j + 1) * s.block_size, visible()); }
};

inline Query query_at(const Batch& batch, int64_t row, int64_t block_size) {
  const int32_t* begins = batch.cu_seqlens_q.at<const int32_t>();
  const int64_t sequences = batch_size(batch);
  if (row >= begins[sequences]) return {.s = {.block_size = block_size}, .row = row};
  const int64_t b = std::upper_bound(begins, begins + sequences + 1, row) - begins - 1;
  const Sequence s = sequence(batch, b, block_size);
  return {.s = s, .i = row - s.q_begin, .row = row};
}

/// body(s) for the visible tokens of the blocks in `ids` [topk], in the list's order; without a
/// list for all visible tokens.
template <class Body>
void for_each_token(const Query& query, const int32_t* ids, int64_t topk, const Body& body) {
  if (query.visible() == 0) return;  // also padded rows, whose ids mean nothing
  if (ids == nullptr) {
    for (int64_t s = 0; s < query.visible(); ++s) body(s);
    return;
  }
  for (int64_t slot = 0; slot < topk && ids[slot] != -1; ++slot) {
    const int64_t j = ids[slot] - query.s.block0;
    if (j < 0) continue;  // another shard's; those after this one end before they begin
    for (int64_t s = j * query.s.block_size; s < query.block_end(j); ++s) body(s);
  }
}

/// Whether token s is one of those.
inline bool reads(const Query& query, const int32_t* ids, int64_t topk, int64_t s) {
  if (s >= query.visible()) return false;
  if (ids == nullptr) return true;
  const int64_t id = query.s.block0 + s / query.s.block_size;
  const int32_t* end = std::find(ids, ids + topk, -1);
  return std::find(ids, end, id) != end;
}

/// One row of packed keys. Rows past cu_seqlens_k[B] belong to an empty sequence, so none reads
/// them.
struct Key {
  Sequence s;
  int64_t token = 0;  ///< index in the sequence
};

inline Key key_at(const Batch& batch, int64_t row, int64_t block_size) {
  const int32_t* begins = batch.cu_seqlens_k.at<const int32_t>();
  const int64_t sequences = batch_size(batch);
  if (row >= begins[sequences]) return {.s = {.block_size = block_size}};
  const int64_t b = std::upper_bound(begins, begins + sequences + 1, row) - begins - 1;
  const Sequence s = sequence(batch, b, block_size);
  return {.s = s, .token = row - s.k_begin};
}

/// The workers of a call; each has its own scratch memory.
struct Team {
  Threads* threads;
  std::byte* memory;
  int64_t bytes_each;

  /// body(task, scratch) for each task.
  template <class Body>
  void for_each(int64_t tasks, const Body& body) const {
    if (threads == nullptr) {
      for (int64_t task = 0; task < tasks; ++task) body(task, memory);
    } else {
      threads->parallel_for(
          tasks, [&](int64_t task, int worker) { body(task, memory + worker * bytes_each); });
    }
  }
};

}  // namespace msa::reference
