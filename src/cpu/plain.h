// What needs no vector unit: top-k lists, per-tile inverse lists, and the operators merge,
// block_lists, append_paged and select_blocks. Compiled once for the baseline instruction set.
#pragma once

#include <span>

#include "core/sequence.h"
#include "msa/backend.h"

namespace msa::cpu {

/// The best blocks of one query so far: scores descending, ties in order of arrival (ascending
/// ids). Blocks that score -inf are not kept: finish_topk fills up with the lowest ids that are
/// missing.
struct TopK {
  float* scores;     ///< [K]
  int32_t* ids;      ///< [K]
  int32_t* count;    ///< in use
  float* threshold;  ///< what a score must exceed to enter
  int32_t capacity;  ///< K less the forced blocks

  void clear();
  /// Precondition: score > *threshold.
  void insert(float score, int32_t id);
};

/// Forced blocks of a query: is block j (global) one of them?
struct Forced {
  int64_t init_end = 0;     ///< blocks 0 .. init_end-1
  int64_t local_begin = 0;  ///< blocks local_begin .. local_end-1
  int64_t local_end = 0;
  __attribute__((always_inline)) bool contains(int64_t j) const {
    return j < init_end || (j >= local_begin && j < local_end);
  }
};

/// The forced blocks of a query whose local block is `local` (global id).
Forced forced_blocks(const Problem& problem, int64_t local);

/// Of the given blocks [begin,end), how many are forced.
int32_t count_forced(const Forced& forced, int64_t begin, int64_t end);

/// Writes the list and the forced blocks of [begin,end) ascending, -1 behind; scores (may be null)
/// get +inf for forced blocks and -inf in the tail.
void finish_topk(const TopK& top, const Forced& forced, int64_t begin, int64_t end, int32_t k,
                 int32_t* ids, float* scores);

/// Sorted (block << 32 | query) of the ids of queries [q0, q0+nq) in slots [slot0,slot1), counting
/// blocks from block0 and leaving out what a query cannot see. Returns how many.
int64_t tile_lists(const TensorView& ids, int64_t head, const Sequence& s, int64_t q0, int64_t nq,
                   int64_t slot0, int64_t slot1, int64_t* pairs);

/// An error where the queue brings more threads than the workspace has slices for.
Status check_team(const Plan& plan, const Queue& queue);

void merge(const Plan&, const MergeParams&, Workspace, Queue);
void block_lists(const Plan&, const BlockListsParams&, Workspace, Queue);

/// merge, block_lists, append_paged and select_blocks.
std::span<const Kernel> plain_kernels();

}  // namespace msa::cpu
