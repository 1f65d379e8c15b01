// One sequence of a batch: where its queries and keys lie and what each query sees.
// Precondition everywhere: the arguments passed check() (core/check.h).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "msa/ops.h"

namespace msa {

struct Sequence {
  int64_t q_begin = 0;  ///< first query row
  int64_t q_len = 0;
  int64_t k_begin = 0;             ///< first key row (packed)
  int64_t kv_len = 0;              ///< keys given (of this shard)
  int64_t pos0 = 0;                ///< position of query 0
  int64_t block0 = 0;              ///< global id of the first given block
  const int32_t* pages = nullptr;  ///< page of the first given block (paged), else null
  int64_t page_stride = 1;         ///< elements from a block's page to the next one's
  int64_t block_size = 1;
  bool causal = true;

  /// Page of given block j.
  int32_t page(int64_t j) const { return pages[j * page_stride]; }
  /// Blocks given, the last one maybe cut.
  int64_t blocks() const { return (kv_len + block_size - 1) / block_size; }
  /// Keys visible to query i: the given keys 0 .. visible(i)-1.
  int64_t visible(int64_t i) const {
    return causal ? std::clamp<int64_t>(pos0 + i + 1 - block0 * block_size, 0, kv_len) : kv_len;
  }
  /// Given blocks with a key visible to query i.
  int64_t visible_blocks(int64_t i) const { return (visible(i) + block_size - 1) / block_size; }
  /// Global id of query i's local block, the last forced one: that of its position, or the last
  /// given one where nothing is masked; less than block0 if there is none.
  int64_t local_block(int64_t i) const {
    if (!causal) return block0 + blocks() - 1;
    return pos0 + i < 0 ? -1 : (pos0 + i) / block_size;
  }
};

inline int64_t batch_size(const Batch& batch) { return batch.cu_seqlens_q.shape[0] - 1; }

/// Never a function of its own: an instruction set's copy could be the one that the linker keeps.
[[gnu::always_inline]] inline Sequence sequence(const Batch& batch, int64_t b, int64_t block_size) {
  const auto value = [](const TensorView& view, int64_t i) -> int64_t {
    return *view.at<const int32_t>(i);
  };
  Sequence s;
  s.block_size = block_size;
  s.causal = batch.causal;
  s.q_begin = value(batch.cu_seqlens_q, b);
  s.q_len = value(batch.cu_seqlens_q, b + 1) - s.q_begin;
  if (batch.cu_seqlens_k.given()) {
    s.k_begin = value(batch.cu_seqlens_k, b);
    s.kv_len = value(batch.cu_seqlens_k, b + 1) - s.k_begin;
  } else {
    s.kv_len = value(batch.seq_lens, b);
    if (const TensorView& table = batch.page_table; table.given()) {
      s.pages = table.at<const int32_t>(batch.page_rows.given() ? value(batch.page_rows, b) : b);
      s.page_stride = table.stride[static_cast<size_t>(table.rank - 1)];
    }
  }
  if (batch.block_offset.given()) s.block0 = value(batch.block_offset, b);
  s.pos0 = batch.q_offset.given() ? value(batch.q_offset, b)
                                  : s.block0 * block_size + s.kv_len - s.q_len;
  return s;
}

/// Rows of one block of one head: row s starts `token_stride` elements after row s-1.
struct BlockRows {
  const std::byte* data = nullptr;
  int64_t token_stride = 0;  ///< in elements
};

/// Given block j (counted from block0) of `keys`: [S,Hkv,D] or [S,Di] packed, [P,Hkv,Bk,D] or
/// [P,Bk,Di] paged. Index keys have no head axis: pass head 0.
inline BlockRows block_rows(const TensorView& keys, const Sequence& s, int64_t j, int64_t head) {
  int64_t offset = 0;
  int64_t token_stride = 0;
  if (s.pages != nullptr) {
    const bool has_heads = keys.rank == 4;
    offset = s.page(j) * keys.stride[0] + (has_heads ? head * keys.stride[1] : 0);
    token_stride = keys.stride[has_heads ? 2 : 1];
  } else {
    offset = (s.k_begin + j * s.block_size) * keys.stride[0] +
             (keys.rank == 3 ? head * keys.stride[1] : 0);
    token_stride = keys.stride[0];
  }
  return {static_cast<const std::byte*>(keys.data) + offset * size_of(keys.dtype), token_stride};
}

}  // namespace msa
