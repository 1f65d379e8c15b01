// Bookkeeping without arithmetic: the inverse of block lists, and writing into a paged cache.
#pragma once

#include <algorithm>
#include <cstring>

#include "reference/rows.h"

namespace msa::reference {

/// visit(row of the CSR, entry) for every listed block of head h that is given, tokens ascending.
template <class Visit>
void for_each_listed(const Problem& p, const BlockListsParams& a, int64_t h, const Visit& visit) {
  int64_t first_row = 0;
  for (int64_t b = 0; b < batch_size(a.batch); ++b) {
    const Sequence s = sequence(a.batch, b, p.block_size);
    for (int64_t t = s.q_begin; t < s.q_begin + s.q_len; ++t) {
      const int32_t* ids = a.block_ids.at<const int32_t>(h, t);
      for (int64_t slot = 0; slot < p.topk && ids[slot] != -1; ++slot) {
        const int64_t j = ids[slot] - s.block0;
        if (j >= 0 && j < s.blocks()) visit(first_row + j, static_cast<int32_t>(t * p.topk + slot));
      }
    }
    first_row += s.blocks();
  }
}

template <class Real>
void compute(const Problem& p, const BlockListsParams& a, const Team& team) {
  team.for_each(p.heads_kv, [&](int64_t h, std::byte*) {
    int32_t* row_ptr = a.row_ptr.at<int32_t>(h);
    int32_t* entries = a.entries.at<int32_t>(h);
    const int64_t rows = a.row_ptr.shape[1] - 1;

    std::fill_n(row_ptr, rows + 1, 0);
    for_each_listed(p, a, h, [&](int64_t row, int32_t) { ++row_ptr[row + 1]; });
    for (int64_t row = 0; row < rows; ++row) row_ptr[row + 1] += row_ptr[row];
    std::fill(entries + row_ptr[rows], entries + a.entries.shape[1], -1);

    // Filling moves each row_ptr to the end of its row, which is where the next row begins.
    for_each_listed(p, a, h, [&](int64_t row, int32_t entry) { entries[row_ptr[row]++] = entry; });
    for (int64_t row = rows; row > 0; --row) row_ptr[row] = row_ptr[row - 1];
    row_ptr[0] = 0;
  });
}

template <class Real>
void compute(const Problem& p, const AppendPagedParams& a, const Team& team) {
  // One head's row of the new token goes where its position says.
  const auto copy = [](const TensorView& pages, int64_t to, const TensorView& rows, int64_t from,
                       int64_t dim) {
    const int64_t size = size_of(pages.dtype);
    std::memcpy(static_cast<std::byte*>(pages.data) + to * size,
                static_cast<const std::byte*>(rows.data) + from * size,
                static_cast<size_t>(dim * size));
  };
  team.for_each(
      a.batch.cu_seqlens_q.at<const int32_t>()[batch_size(a.batch)], [&](int64_t t, std::byte*) {
        const Query query = query_at(a.batch, t, p.block_size);
        if (query.s.kv_len == 0) return;  // padding
        const int64_t position = query.s.kv_len - query.s.q_len + query.i;
        const int64_t page = query.s.page(position / p.block_size);
        const int64_t slot = position % p.block_size;
        for (int64_t h = 0; a.k.given() && h < p.heads_kv; ++h) {
          copy(a.k_pages, a.k_pages.offset(page, h, slot), a.k, a.k.offset(t, h), p.head_dim);
          copy(a.v_pages, a.v_pages.offset(page, h, slot), a.v, a.v.offset(t, h), p.head_dim);
        }
        if (a.k_idx.given())
          copy(a.k_idx_pages, a.k_idx_pages.offset(page, slot), a.k_idx, a.k_idx.offset(t),
               p.index_dim);
      });
}

}  // namespace msa::reference
