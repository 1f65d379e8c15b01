// Which blocks a query may choose from.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/index/config.h"

namespace msa::cuda::sm90::index {

/// What the caller asks for; see select_blocks in msa/ops.h.
struct Selection {
  int32_t topk;          ///< K
  int32_t init_blocks;   ///< forced at the start of the sequence
  int32_t local_blocks;  ///< forced at the query's end
};

/// Blocks are counted from the first given one. The query sees blocks 0 .. visible-1; those of
/// first .. end-1 must win by their score, the others are forced.
struct BlockRange {
  int first, end, visible;

  __device__ int forced() const { return first + visible - end; }
  /// i-th forced block.
  __device__ int forced_block(int i) const { return i < first ? i : end + i - first; }
};

/// `visible` of the blocks, the query standing in block `last`.
__device__ inline BlockRange block_range(const Selection& selection, int visible, int last,
                                         int block0) {
  BlockRange range;
  range.visible = visible;
  range.end = min(max(last - selection.local_blocks + 1, 0), visible);
  range.first = min(max(selection.init_blocks - block0, 0), range.end);
  return range;
}

/// A query that would see `seen` given keys if there were no end to them (its position + 1).
__device__ inline BlockRange block_range(const Selection& selection, int seen, int kv_len,
                                         int block0, int max_blocks) {
  if (seen <= 0 || kv_len <= 0) return {.first = 0, .end = 0, .visible = 0};
  const int visible = (min(seen, kv_len) + kBlock - 1) / kBlock;
  return block_range(selection, min(visible, max_blocks), (seen - 1) / kBlock, block0);
}

/// Given keys before query i and its own, whether they exist or not.
__device__ inline int seen_keys(const DeviceSequence& s, int i) {
  const int64_t seen = int64_t{s.pos0} + i + 1 - int64_t{s.block0} * kBlock;
  constexpr int64_t kFar = INT32_MAX / 2;
  return static_cast<int>(seen < -kFar ? -kFar : seen > kFar ? kFar : seen);
}

/// One query row of the batch.
struct Token {
  BlockRange range{};  ///< nothing for padding
  int sequence = -1;
  int query = 0;   ///< its number in the sequence
  int block0 = 0;  ///< of the sequence
};

/// A whole warp asks.
__device__ inline Token find_token(const DeviceBatch& batch, const Selection& selection, int token,
                                   int max_blocks) {
  Token t;
  t.sequence = batch.warp_sequence_of(token);
  if (t.sequence < 0) return t;
  const DeviceSequence s = batch.sequence(t.sequence);
  t.query = token - s.q_begin;
  t.block0 = s.block0;
  t.range = block_range(selection, seen_keys(s, t.query), s.kv_len, s.block0, max_blocks);
  return t;
}

}  // namespace msa::cuda::sm90::index
