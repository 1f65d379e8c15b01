// Shapes and the one tuning decision of the decode kernels; plain arithmetic, no CUDA.
#pragma once

#include <cstdint>

#include "cuda/sm90/shape.h"
#include "cuda/sm90/sizes.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::decode {

inline constexpr int kRows = 16;     // heads of a group, or (token, index head) rows: one mma
inline constexpr int kMaxList = 32;  // K: one lane of a warp per entry

// Of the kernels that choose blocks:
inline constexpr int kMaxChosen = 16;                  // K
inline constexpr int kMaxBlocks = (1 << 20) / kBlock;  // of one sequence
inline constexpr int kMaxSequences = 1024;  // B: their lengths are summed in shared memory

/// Floats of a score row, of which there is one per (token, index head): a multiple of 4.
constexpr int64_t score_columns(int64_t max_seqlen_k) {
  return ((max_seqlen_k + kBlock - 1) / kBlock + 3) / 4 * 4;
}

/// CTAs that share the list of one (token, KV head), a power of two up to 16: as many as still find
/// an SM of their own (dev/notes/decode.md has the table; two per SM lose 3 to 50 %).
constexpr uint32_t cluster_size(int64_t tokens, int64_t heads_kv) {
  uint32_t size = 1;
  while (size < 16 && int64_t{2} * size * tokens * heads_kv <= kSMs) size *= 2;
  return size;
}

}  // namespace msa::cuda::sm90::decode
