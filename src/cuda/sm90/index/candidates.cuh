// Which blocks a query may choose from.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/index/config.h"
#include "cuda/topk.cuh"

namespace msa::cuda::sm90::index {

/// A query that would see `seen` given keys if there were no end to them (its position + 1).
__device__ inline Candidates candidates(const Selection& selection, int seen, int kv_len,
                                        int block0, int max_blocks) {
  if (seen <= 0 || kv_len <= 0) return {};
  const int visible = (min(seen, kv_len) + kBlock - 1) / kBlock;
  return candidates(selection, min(visible, max_blocks), (seen - 1) / kBlock, block0);
}

/// Given keys before query i and its own, whether they exist or not.
__device__ inline int seen_keys(const DeviceSequence& s, int i) {
  const int64_t seen = int64_t{s.pos0} + i + 1 - int64_t{s.block0} * kBlock;
  constexpr int64_t kFar = INT32_MAX / 2;
  return static_cast<int>(seen < -kFar ? -kFar : seen > kFar ? kFar : seen);
}

/// One query row of the batch.
struct Query {
  Candidates candidates{};  ///< none for padding
  int sequence = -1;
  int number = 0;  ///< in the sequence
};

/// A whole warp asks.
__device__ inline Query find_query(const DeviceBatch& batch, const Selection& selection, int token,
                                   int max_blocks) {
  Query q;
  q.sequence = batch.warp_sequence_of(token);
  if (q.sequence < 0) return q;
  const DeviceSequence s = batch.sequence(q.sequence);
  q.number = token - s.q_begin;
  q.candidates = candidates(selection, seen_keys(s, q.number), s.kv_len, s.block0, max_blocks);
  return q;
}

/// A chosen block in a list of a part; id -1 and kNoOrder for none.
struct alignas(8) Entry {
  uint32_t order;
  int32_t id;
};

}  // namespace msa::cuda::sm90::index
