// Who reads whom: the keys that a query reads, and the queries that read a key.
#pragma once

#include "cuda/block_list.cuh"
#include "cuda/smxx/inverse_lists.h"
#include "cuda/smxx/tile.cuh"

namespace msa::cuda::plain {

// ---- the keys of a query ----

/// Which keys a query reads, one after the other.
struct Walk {
  const int32_t* ids;  ///< the list, or null: all keys in order
  bool ascends;        ///< the list: it names no block twice
  int64_t count;       ///< steps
  int block_size;
  int blocks;  ///< given ones
  int block0;
  int visible;

  /// Key of a step, or -1 if there is none that the query sees.
  __device__ int key(int64_t step) const {
    if (step >= count) return -1;
    int64_t token = step;
    if (ids != nullptr) {
      const auto slot = static_cast<int>(step / block_size);
      const int64_t j = int64_t{ids[slot]} - block0;
      if (j < 0 || j >= blocks) return -1;  // another shard's
      if (!ascends && named_before(ids, slot)) return -1;
      token = j * block_size + step % block_size;
    }
    return token < visible ? static_cast<int>(token) : -1;
  }
};

/// Entries of a list up to its first -1, and whether they ascend; all lanes of a warp together.
__device__ inline int list_length(const int32_t* ids, int topk, bool* ascends) {
  *ascends = true;
  for (int first = 0; first < topk; first += 32) {
    const int slot = first + lane(), id = slot < topk ? ids[slot] : -1;
    const uint32_t end = __ballot_sync(0xffffffff, id < 0);
    *ascends &= __all_sync(0xffffffff, id < 0 || slot == 0 || ids[slot - 1] < id);
    if (end != 0) return first + __ffs(static_cast<int>(end)) - 1;
  }
  return topk;
}

/// That of query row t for a KV head. `ids` [Hkv,T,K], or not given: every visible key.
__device__ inline Walk walk_of(const DeviceBatch& batch, const Query& query, const Tensor& ids,
                               int topk, int t, int kv_head) {
  Walk walk{.ids = nullptr,
            .ascends = true,
            .count = query.visible,
            .block_size = batch.block_size,
            .blocks = query.s.blocks(batch.block_size),
            .block0 = query.s.block0,
            .visible = query.visible};
  if (ids.data != nullptr && query.visible > 0) {
    walk.ids = &ids.at<const int32_t>(kv_head, t, 0);
    walk.count = int64_t{list_length(walk.ids, topk, &walk.ascends)} * walk.block_size;
  }
  return walk;
}

// ---- the queries of a key (packed keys only) ----
//
// The roles are changed: the up to 16 rows of a CTA are keys, its lanes are 32 queries.

inline constexpr int kQueries = 32;  // a lane each
inline constexpr int kKeyThreads = 32 * kMostRows / kWarpRows;

/// First row in the CSR of block lists of sequence b; all lanes of a warp together. Nobody checked
/// the lengths, so the sum may lie far behind the last row.
__device__ inline int64_t first_row(const DeviceBatch& batch, int b) {
  int64_t blocks = 0;
  for (int before = lane(); before < b; before += 32)
    blocks += batch.sequence(before).blocks(batch.block_size);
  for (int step = 16; step > 0; step /= 2) blocks += __shfl_xor_sync(0xffffffff, blocks, step);
  return blocks;
}

/// Neighbouring rows of k that the same queries read: keys of one block, or rows of no sequence.
struct KeyRun {
  int begin;  ///< row of k
  int count;  ///< rows
  DeviceSequence s{};
  int key = 0;      ///< its first key, counted in the sequence
  int64_t row = 0;  ///< of the CSR
  bool exists = false;

  /// Whether a query that sees the keys up to `visible` sees key `i` of the run.
  __device__ bool sees(int visible, int i = 0) const { return i < count && key + i < visible; }
};

/// The run that begins at row `begin` of k, up to row `end`; all lanes of a warp together.
__device__ inline KeyRun key_run(const DeviceBatch& batch, int begin, int end) {
  const int b = batch.sequence_of_key(begin);
  KeyRun run{.begin = begin, .count = end - begin};
  if (b < 0) return run;
  run.s = batch.sequence(b);
  run.key = begin - run.s.k_begin;
  run.exists = run.key >= 0 && run.key < run.s.kv_len;
  if (!run.exists) return run;  // lengths that do not ascend
  run.row = first_row(batch, b) + run.key / batch.block_size;
  const int block_left = batch.block_size - run.key % batch.block_size;
  run.count = min(run.count, min(block_left, run.s.kv_len - run.key));
  return run;
}

/// A query row and how many keys it sees; those of no query see none.
struct Reader {
  int t = -1;
  int visible = 0;
};

/// The queries that read the keys of a run for one KV head, one after the other.
struct Readers {
  const int32_t* entries;  ///< or null: the queries from `first` on
  int64_t count;           ///< steps
  int topk;
  int first;

  __device__ Reader at(int64_t step, const DeviceBatch& batch, const DeviceSequence& s) const {
    if (step >= count) return {};
    int64_t i = first + step;  // in the sequence
    if (entries != nullptr) {
      const int entry = entries[step];
      i = int64_t{entry / topk} - s.q_begin;
      if (entry < 0 || i < 0 || i >= s.q_len) return {};
    }
    const int query = static_cast<int>(i);
    return {s.q_begin + query, s.visible(query, batch.block_size, batch.causal)};
  }
};

__device__ inline Readers readers_of(const DeviceBatch& batch, const KeyRun& run,
                                     const InverseLists& lists, int kv_head) {
  Readers readers{.entries = nullptr, .count = 0, .topk = lists.topk, .first = 0};
  if (!run.exists) return readers;
  if (lists.row_ptr.data == nullptr) {
    // The first query that sees the run's first key; those ahead of it see none.
    const int64_t first = int64_t{run.s.block0} * batch.block_size + run.key - run.s.pos0;
    if (batch.causal && first > 0)
      readers.first = static_cast<int>(min(first, int64_t{run.s.q_len}));
    readers.count = run.s.q_len - readers.first;
  } else if (run.row < lists.rows) {
    const auto place = [&](int64_t row) {
      return min(max(int64_t{lists.row_ptr.at<const int32_t>(kv_head, row)}, int64_t{0}),
                 lists.most);
    };
    const int64_t begin = place(run.row);
    readers.entries = &lists.entries.at<const int32_t>(kv_head, begin);
    readers.count = place(run.row + 1) - begin;  // negative: none
  }
  return readers;
}

/// stage() of the keys of a run of up to 16; zeros behind them.
__device__ inline void stage_run(float* rows, int dim, const KeyTensor& keys, int head,
                                 const KeyRun& run) {
  stage(rows, kMostRows, dim, keys.data, keys.dtype, [&](int i) {
    const bool is_key = run.exists && i < run.count;
    return is_key ? (run.begin + i) * keys.row_stride + head * keys.head_stride : int64_t{-1};
  });
}

/// stage() of a query row per lane: row l of the tile is row `t` of lane l, or zeros if that is -1.
__device__ inline void stage_queries(float* tile, int dim, const Tensor& queries, int head, int t) {
  stage(tile, kQueries, dim, queries.data, queries.dtype, [&](int l) {
    const int row = __shfl_sync(0xffffffff, t, l);
    return row < 0 ? int64_t{-1} : queries.offset(row, head);
  });
}

}  // namespace msa::cuda::plain
