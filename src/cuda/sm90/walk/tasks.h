// How work on blocks of keys is cut into tasks, and where their lists lie in the workspace; plain
// arithmetic, no CUDA. Used by attention backward and by the KL loss.
//
// A row is a block of a sequence: those of all sequences in their order, as block_lists numbers
// them. A task is a row, a KV head and some of the queries that read the block for that head. What
// a task sums up over its queries is a part in fp32; the parts of a row are added in their order.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/placement.h"
#include "cuda/sm90/sizes.h"
#include "cuda/sm90/walk/config.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::walk {

/// A block of keys and some of the queries that read it.
struct alignas(16) Task {
  int32_t source;  ///< row of k and v of the block's first key
  int32_t keys;    ///< 1 .. 128: as far as the sequence goes
  int32_t head;    ///< KV head
  int32_t begin;   ///< its queries: entries[head][begin .. begin+count-1], or without lists the
  int32_t count;   ///< query rows begin .. begin+count-1
  int32_t q_begin, q_end;  ///< query rows of the sequence; an entry with another is none
  int32_t seen;            ///< the query at row t sees clamp(seen + t, 0, keys) of the keys
  int32_t block;           ///< its number in the sequence, from the first given one
  int32_t part;            ///< its partial result
  int32_t unused[2];
};
static_assert(sizeof(Task) == 48);

/// Tasks are cut in units of so many queries: whole tiles.
inline constexpr int kTaskUnit = 16;
/// Neither longer than this part of what an SM does in all, nor shorter than this.
inline constexpr int64_t kLongestShare = 8;
inline constexpr int64_t kLeastTaskQueries = 64;

/// Sizes of the task lists for any call within limits, and their first bytes in the workspace.
struct TaskLayout {
  int64_t rows;          ///< most rows
  int64_t parts;         ///< most tasks of all heads
  int64_t task_queries;  ///< most queries of a task, a multiple of kTaskUnit

  int64_t row_begin;  ///< i32 [B+1]: first row of each sequence
  int64_t counters;   ///< i32 [2]: tasks in all, tasks taken so far
  int64_t part_ptr;   ///< i32 [Hkv*rows+1]: first part of each (head, row)
  int64_t tasks;      ///< Task [parts], largest first
  int64_t end;
};

/// Most rows of a call within limits. Limits do not bound S; a call with S > max(T, max_seqlen_k)
/// of the plan may have more, and is then not for these kernels.
constexpr int64_t most_rows(const Limits& limits) {
  const int64_t blocks = (limits.max_seqlen_k + kBlock - 1) / kBlock;
  const int64_t keys = std::max(limits.max_tokens, limits.max_seqlen_k);
  return std::min(limits.max_batch * blocks, keys / kBlock + limits.max_batch);
}

/// `listed`: by inverse lists; else every query reads all blocks. The lists begin at byte `begin`.
constexpr TaskLayout task_layout(const Problem& problem, const Limits& limits, bool listed,
                                 int64_t begin) {
  const int64_t blocks = (limits.max_seqlen_k + kBlock - 1) / kBlock;
  // (query, block) pairs of all heads.
  const int64_t pairs = limits.max_tokens * (listed ? problem.topk : blocks) * problem.heads_kv;
  const int64_t share = pairs / (kSMs * kLongestShare) / kTaskUnit * kTaskUnit;
  TaskLayout l{};
  l.rows = most_rows(limits);
  l.task_queries = std::clamp<int64_t>(share, kLeastTaskQueries, int64_t{1} << 30);
  // A row of n > 0 queries makes ceil(n / task_queries) tasks.
  l.parts = problem.heads_kv * l.rows + pairs / l.task_queries;
  Placement at(begin);
  l.row_begin = at.place((limits.max_batch + 1) * 4);
  l.counters = at.place(8);
  l.part_ptr = at.place((problem.heads_kv * l.rows + 1) * 4);
  l.tasks = at.place(l.parts * int64_t{sizeof(Task)});
  l.end = at.end();
  return l;
}

/// Whether a call has no more rows than a layout for `limits`: `keys` rows of k, B `sequences`.
constexpr bool has_room(const Limits& limits, int64_t keys, int64_t sequences) {
  const int64_t blocks = (limits.max_seqlen_k + kBlock - 1) / kBlock;
  return std::min(sequences * blocks, keys / kBlock + sequences) <= most_rows(limits);
}

}  // namespace msa::cuda::sm90::walk
