// How a prefill in KV-outer order is cut into windows, and where their lists and partial results
// lie in the workspace; plain arithmetic, no CUDA.
//
// A window is a number of neighbouring query rows of the batch. Every (query, slot) of it leaves a
// partial result, 270 KB per token with 64 heads and K 16, which is why there are windows at all.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/placement.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/prefill/order.h"
#include "cuda/sm90/sizes.h"
#include "cuda/tile/part_softmax.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::prefill {

/// One block of keys and values and some of the queries that chose it.
struct alignas(16) WindowTask {
  int32_t source;  ///< packed: first row of the block in k and v; paged: its page
  int32_t head;    ///< KV head
  uint16_t begin;  ///< its queries are entries begin .. begin+count-1 of the (window, head)
  uint16_t count;  ///< 1 .. Windows::task_queries
  int16_t seen;    ///< a query at row r of the window sees min(keys, seen + r) keys of the block
  uint16_t keys;   ///< 1 .. 128: as far as the sequence goes
};
static_assert(sizeof(WindowTask) == 16);

/// An entry is a (query, slot) of a window: row in the window * 16 + slot.
using Entry = uint16_t;
inline constexpr int64_t kMostWindowTokens = (1 << 16) / kMostSlots;

/// Ahead of everything in the workspace: struct Header.
inline constexpr int64_t kHeaderBytes = 256;

/// Sizes of the parts, and their first bytes in the workspace.
struct Windows {
  int64_t tokens;        ///< W: query rows of a window
  int64_t round;         ///< windows whose lists there is room for
  int64_t task_queries;  ///< most entries of a task, a multiple of 8

  int64_t counters;  ///< i32 [round, 1 + Hkv]: tasks taken so far, tasks of each head
  int64_t chosen;    ///< u16 [round,Hkv,W]: bit s = slot s is in the lists
  int64_t entries;   ///< Entry [round,Hkv,W*K], by blocks
  int64_t tasks;     ///< WindowTask [round,Hkv,W*K], largest first
  int64_t softmax;   ///< PartSoftmax [Hkv,W,K,G]
  int64_t o;         ///< bf16 [Hkv,W,K,G,D], not divided by the sums
  int64_t bytes;     ///< of all
};

/// For any call within `limits`.
constexpr Windows windows(const Problem& problem, const Limits& limits) {
  const int64_t heads_kv = problem.heads_kv, heads_q = problem.heads_q, topk = problem.topk;
  const int64_t part_bytes =
      heads_q * topk * int64_t{kDim * 2 + sizeof(PartSoftmax)};  // of a token
  const int64_t most = std::clamp<int64_t>(kPartBytes / part_bytes, 1, kMostWindowTokens);
  const int64_t count = (limits.max_tokens + most - 1) / most;
  Windows w{};
  w.tokens = (limits.max_tokens + count - 1) / count;
  w.round = std::min(count, kRoundWindows);
  // The longest task is an eighth of what an SM does in a window; from 248 queries on the block's
  // 64 KB are 6 % of what is loaded, at 16 they are half of it.
  const int64_t share = w.tokens * topk * heads_kv / kSMs;
  w.task_queries = std::clamp<int64_t>(share / 8 / 8 * 8, 16, kMostTaskQueries);

  Placement at(kHeaderBytes);
  const int64_t lists = w.round * heads_kv, slots = w.tokens * topk;
  w.counters = at.place(w.round * (1 + heads_kv) * 4);
  w.chosen = at.place(lists * w.tokens * 2);
  w.entries = at.place(lists * slots * int64_t{sizeof(Entry)});
  w.tasks = at.place(lists * slots * int64_t{sizeof(WindowTask)});
  w.softmax = at.place(slots * heads_q * int64_t{sizeof(PartSoftmax)});
  w.o = at.place(slots * heads_q * kDim * 2);
  w.bytes = at.end();
  return w;
}

/// At the start of the workspace, zeros ahead of every call.
struct Header {
  int32_t next_tile;  ///< of the union: tiles taken so far
  Overlap overlap;
};
static_assert(sizeof(Header) <= kHeaderBytes);

/// The lists of one window.
struct WindowLists {
  int32_t* taken;       ///< tasks taken so far
  int32_t* task_count;  ///< [Hkv]
  uint16_t* chosen;     ///< [Hkv,W]
  Entry* entries;       ///< [Hkv,W*K]
  WindowTask* tasks;    ///< [Hkv,W*K]
};

/// Those of window i of a round.
MSA_HOST_DEVICE inline WindowLists window_lists(const Windows& w, std::byte* workspace,
                                                int64_t heads_kv, int64_t topk, int64_t i) {
  const int64_t tokens = i * heads_kv * w.tokens;
  auto* counters = reinterpret_cast<int32_t*>(workspace + w.counters) + i * (1 + heads_kv);
  return {.taken = counters,
          .task_count = counters + 1,
          .chosen = reinterpret_cast<uint16_t*>(workspace + w.chosen) + tokens,
          .entries = reinterpret_cast<Entry*>(workspace + w.entries) + tokens * topk,
          .tasks = reinterpret_cast<WindowTask*>(workspace + w.tasks) + tokens * topk};
}

}  // namespace msa::cuda::sm90::prefill
