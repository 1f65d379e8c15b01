// What one query row sees.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/decode/config.h"
#include "cuda/topk.cuh"

namespace msa::cuda::sm90::decode {

struct Token {
  DeviceSequence sequence;
  int visible;   ///< keys, 0 for padding
  int position;  ///< in the sequence

  __device__ int blocks() const { return (visible + kBlock - 1) / kBlock; }
  /// Among `columns` blocks that have a score: lengths beyond the plan's limits are cut. `causal`
  /// as in the batch.
  __device__ Candidates choices(const Selection& selection, int64_t columns, bool causal) const {
    const int own = position < 0 ? -1 : position / kBlock;
    return candidates(selection, static_cast<int>(min(int64_t{blocks()}, columns)),
                      causal ? own - sequence.block0 : blocks() - 1, sequence.block0);
  }
};

/// Query row t. A whole warp asks.
__device__ inline Token find_token(const DeviceBatch& batch, int t) {
  Token token{};
  const int b = batch.warp_sequence_of(t);
  if (b < 0) return token;
  token.sequence = batch.sequence(b);
  const int i = t - token.sequence.q_begin;
  if (i < 0 || i >= token.sequence.q_len) return token;
  token.visible = token.sequence.visible(i, kBlock, batch.causal);
  token.position = token.sequence.pos0 + i;
  return token;
}

}  // namespace msa::cuda::sm90::decode
