// Where the lists and the partial results of the index branch lie in the workspace; plain
// arithmetic, no CUDA.
//
// With lists every (head, query, slot) has a place. Without, a call goes by rounds of kMostSlots
// blocks of every sequence, whose places are the same: so the workspace does not grow with the
// context.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/walk/tasks.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::kl {

/// Sizes of the parts, and their first bytes in the workspace.
struct Parts {
  int64_t slots;   ///< places of a (head, query)
  int64_t rounds;  ///< most that a call needs

  walk::TaskLayout tasks;  ///< of one round
  int64_t row_ptr;         ///< i32 [Hkv,rows+1]: block lists of a caller who has none
  int64_t entries;         ///< i32 [Hkv,T*K]
  int64_t scratch;         ///< of the kernel that makes them
  int64_t scalars;         ///< f32 [Hkv,T,slots]: LSE or kl
  int64_t dq;              ///< f32 [Hkv,T,slots,Di]
  int64_t sums;            ///< f32 [Hkv,T,Di]: dq of the rounds so far
  int64_t dk;              ///< f32 [parts,128,Di]
  int64_t bytes;           ///< of all
};

/// For any call within `limits`, with or without lists of blocks. `scratch` bytes to make lists.
constexpr Parts parts(const Problem& problem, const Limits& limits, bool listed, int64_t scratch) {
  const int64_t blocks = (limits.max_seqlen_k + kBlock - 1) / kBlock;
  const int64_t rows = problem.heads_kv * limits.max_tokens;
  const bool gradients = problem.op == Op::kKlBackward;
  Problem round = problem;
  if (!listed) round.topk = kMostSlots;
  Parts p{};
  p.slots = round.topk;
  p.rounds = listed ? 1 : std::max<int64_t>(1, (blocks + kMostSlots - 1) / kMostSlots);
  p.tasks = walk::task_layout(round, limits, /*listed=*/true, 0);
  Placement at(p.tasks.end);
  p.row_ptr = at.place(listed ? problem.heads_kv * (p.tasks.rows + 1) * 4 : 0);
  p.entries = at.place(listed ? rows * p.slots * 4 : 0);
  p.scratch = at.place(listed ? scratch : 0);
  p.scalars = at.place(rows * p.slots * 4);
  p.dq = at.place(gradients ? rows * p.slots * kDim * 4 : 0);
  p.sums = at.place(gradients && p.rounds > 1 ? rows * kDim * 4 : 0);
  p.dk = at.place(gradients ? p.tasks.parts * kBlock * kDim * 4 : 0);
  p.bytes = at.end();
  return p;
}

}  // namespace msa::cuda::sm90::kl
