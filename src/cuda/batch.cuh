// The batch as a kernel sees it. Lengths, pages and ids lie in device memory, where nobody checked
// them: every value is clamped here, once, so that no kernel can leave the caller's buffers.
#pragma once

#include <cstdint>
#include <cstdio>

#include "msa/ops.h"

namespace msa::cuda {

#ifdef MSA_CHECKED
#define MSA_DEVICE_CHECK(condition, ...) \
  do {                                   \
    if (!(condition)) {                  \
      printf("msa: " __VA_ARGS__);       \
      __trap();                          \
    }                                    \
  } while (false)
#else
#define MSA_DEVICE_CHECK(condition, ...) \
  do {                                   \
  } while (false)
#endif

/// One sequence; see core/sequence.h, whose twin this is.
struct DeviceSequence {
  int32_t q_begin;       ///< first query row
  int32_t q_len;         ///< query rows, inside [0, T)
  int32_t k_begin;       ///< first key row (packed)
  int32_t kv_len;        ///< keys given, inside the tensor or the page table
  int32_t pos0;          ///< position of query 0
  int32_t block0;        ///< global id of the first given block
  const int32_t* pages;  ///< page of the first given block (paged), else null

  __device__ int blocks(int block_size) const {
    return kv_len / block_size + (kv_len % block_size > 0 ? 1 : 0);
  }
  /// Keys visible to query i: the given keys 0 .. visible(i)-1.
  __device__ int visible(int i, int block_size, bool causal) const {
    if (!causal) return kv_len;
    const int64_t end = int64_t{pos0} + i + 1 - int64_t{block0} * block_size;
    return static_cast<int>(end < 0 ? 0 : end > kv_len ? kv_len : end);
  }
};

/// By value into kernels (64 or so bytes).
struct DeviceBatch {
  const int32_t* cu_seqlens_q;  ///< [B+1]
  const int32_t* cu_seqlens_k;  ///< [B+1], or null when paged
  const int32_t* seq_lens;      ///< [B], or null when packed
  const int32_t* page_table;    ///< [rows,max_pages] or flat [entries], or null
  const int32_t* page_rows;     ///< [B], or null: row b
  const int32_t* q_offset;      ///< [B], or null
  const int32_t* block_offset;  ///< [B], or null
  int64_t page_table_stride;    ///< elements from one row of the table to the next
  int64_t page_rows_stride;     ///< elements
  int32_t page_stride;          ///< bytes from a block's page to the next one's
  int32_t page_table_rows;      ///< rows, or entries of a flat table
  int32_t sequences;            ///< B
  int32_t tokens;               ///< T: rows of q, padded ones included
  int32_t keys;                 ///< S: rows of packed k; max_pages * Bk when paged
  int32_t pages;                ///< P, 0 when packed
  int32_t block_size;           ///< Bk
  bool causal;
  bool flat_table;

  __device__ int clamp(int value, int low, int high) const {
    MSA_DEVICE_CHECK(value >= low && value <= high,
                     "got a length or offset of %d, expected %d..%d\n", value, low, high);
    return value < low ? low : value > high ? high : value;
  }

  __device__ DeviceSequence sequence(int b) const {
    DeviceSequence s;
    s.q_begin = clamp(cu_seqlens_q[b], 0, tokens);
    s.q_len = clamp(cu_seqlens_q[b + 1], s.q_begin, tokens) - s.q_begin;
    s.k_begin = 0;
    s.pages = nullptr;
    if (cu_seqlens_k != nullptr) {
      s.k_begin = clamp(cu_seqlens_k[b], 0, keys);
      s.kv_len = clamp(cu_seqlens_k[b + 1], s.k_begin, keys) - s.k_begin;
    } else {
      s.kv_len = clamp(seq_lens[b], 0, keys);
      if (page_table != nullptr) {
        int row = b;
        if (page_rows != nullptr) row = clamp(page_rows[b * page_rows_stride], 0, page_table_rows);
        if (flat_table) {
          const int64_t most = int64_t{page_table_rows - row} * block_size;
          if (s.kv_len > most) s.kv_len = static_cast<int32_t>(most);
        } else if (row == page_table_rows) {
          s.kv_len = 0;
        }
        s.pages = page_table + row * page_table_stride;
      }
    }
    s.block0 = block_offset != nullptr ? clamp(block_offset[b], 0, INT32_MAX / block_size - 1) : 0;
    s.pos0 = q_offset != nullptr ? clamp(q_offset[b], 0, INT32_MAX / 2)
                                 : s.block0 * block_size + s.kv_len - s.q_len;
    return s;
  }

  /// Page of given block j, or -1 if the table names none of the pool's.
  __device__ int page(const DeviceSequence& s, int j) const {
    const int page = *reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(s.pages) +
                                                       int64_t{j} * page_stride);
    MSA_DEVICE_CHECK(page >= 0 && page < pages, "page_table: got page %d, expected 0..%d\n", page,
                     pages - 1);
    return page >= 0 && page < pages ? page : -1;
  }

  /// Sequence of query row t, which is then one of its rows, or -1 for a row of padding.
  __device__ int sequence_of(int t) const { return search(cu_seqlens_q, t); }
  /// The same of a row of packed keys.
  __device__ int sequence_of_key(int row) const { return search(cu_seqlens_k, row); }

  /// B+1 ascending values: a binary search. Where they do not ascend, a row may belong to nobody.
  __device__ int search(const int32_t* begins, int row) const {
    int low = 0, high = sequences;  // the answer lies in [low, high)
    if (sequences == 0 || row >= begins[sequences]) return -1;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      if (begins[middle] <= row)
        low = middle;
      else
        high = middle;
    }
    return begins[low] <= row ? low : -1;
  }

  /// sequence_of(t) asked by all lanes of a warp at once: independent loads instead of a chain of
  /// them.
  __device__ int warp_sequence_of(int t) const {
    int before = 0;  // sequences that end at or before row t
#pragma unroll 1
    for (int b = static_cast<int>(threadIdx.x) % 32; b < sequences; b += 32)
      before += cu_seqlens_q[b + 1] <= t;
    before = __reduce_add_sync(0xffffffff, before);
    const bool is_row =
        before < sequences && cu_seqlens_q[before] <= t && t < cu_seqlens_q[before + 1];
    return is_row ? before : -1;
  }
};

/// Arguments passed check(): shapes agree. `block_size` is the problem's; `pool` is k, k_idx or,
/// for block_lists, not given.
inline DeviceBatch device_batch(const Batch& batch, int64_t tokens, const TensorView& pool,
                                int32_t block_size) {
  DeviceBatch d{};
  d.cu_seqlens_q = batch.cu_seqlens_q.at<const int32_t>();
  d.cu_seqlens_k = batch.cu_seqlens_k.given() ? batch.cu_seqlens_k.at<const int32_t>() : nullptr;
  d.seq_lens = batch.seq_lens.given() ? batch.seq_lens.at<const int32_t>() : nullptr;
  d.q_offset = batch.q_offset.given() ? batch.q_offset.at<const int32_t>() : nullptr;
  d.block_offset = batch.block_offset.given() ? batch.block_offset.at<const int32_t>() : nullptr;
  d.sequences = static_cast<int32_t>(batch.cu_seqlens_q.shape[0] - 1);
  d.tokens = static_cast<int32_t>(tokens);
  d.keys = INT32_MAX;
  if (batch.page_table.given()) {
    const TensorView& table = batch.page_table;
    const auto last = static_cast<size_t>(table.rank - 1);
    d.page_table = table.at<const int32_t>();
    d.page_table_stride = table.stride[0];
    d.page_stride = static_cast<int32_t>(table.stride[last] * int64_t{sizeof(int32_t)});
    d.page_table_rows =
        static_cast<int32_t>(table.shape[0] < INT32_MAX ? table.shape[0] : INT32_MAX);
    d.flat_table = table.rank == 1;
    if (batch.page_rows.given()) {
      d.page_rows = batch.page_rows.at<const int32_t>();
      d.page_rows_stride = batch.page_rows.stride[0];
    }
    const int64_t keys = table.shape[last] * block_size;
    d.keys = static_cast<int32_t>(keys < INT32_MAX ? keys : INT32_MAX);
    d.pages = pool.given() ? static_cast<int32_t>(pool.shape[0]) : 0;
  } else if (pool.given()) {
    d.keys = static_cast<int32_t>(pool.shape[0]);
  }
  d.block_size = block_size;
  d.causal = batch.causal;
  return d;
}

}  // namespace msa::cuda
