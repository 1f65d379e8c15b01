// Shapes and tuning decisions of the index kernels; plain arithmetic, no CUDA.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/shape.h"
#include "cuda/sm90/sizes.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::index {

inline constexpr int kList = 16;       // K at most: slots of a row's running list
inline constexpr int kMaxSelect = 32;  // K of select_blocks: one lane per chosen block

/// How one CTA multiplies. Rows are (query, index head) pairs, heads innermost. A warpgroup holds
/// kTiles accumulators of 64 rows x 128 keys: while one is reduced, the others' products run.
template <int Warpgroups, int Tiles, int Stages>
struct TileShape {
  static constexpr int kWarpgroups = Warpgroups;
  static constexpr int kTiles = Tiles;
  static constexpr int kStages = Stages;  // of one block of keys, 32 KB
  static constexpr int kWarpgroupRows = 64 * kTiles;
  static constexpr int kRows = kWarpgroupRows * kWarpgroups;
  static constexpr int kThreads = 128 * (kWarpgroups + 1);  // and the producer's warpgroup
  static constexpr bool kReadsOnce = kRows == 64;           // no other CTA wants the same keys
};
/// 256 rows use a block of keys while L2 delivers the next: 2048 cycles of the tensor cores.
using WideTile = TileShape<2, 2, 6>;
/// Few rows: the time is that of reading the keys once.
using NarrowTile = TileShape<1, 1, 4>;

constexpr bool is_narrow(const Problem& problem, const Limits& limits) {
  return limits.max_seqlen_q * problem.heads_kv <= NarrowTile::kRows;
}

/// Tiles of `rows` rows have numbers below this: sequence b's begin at q_begin / queries + b, so
/// that a binary search finds a tile's sequence. Some numbers name no tile; the last sequence is
/// the padding behind the others.
constexpr int64_t tile_numbers(int64_t tokens, int64_t sequences, int queries) {
  return tokens / queries + sequences + 1;
}

/// Into how many parts the keys of a tile are split. A part costs its blocks, and a fixed time
/// worth kStart blocks; the parts of all tiles are dealt to the SMs, longest first, and then
/// merged.
constexpr int splits(const Problem& problem, const Limits& limits) {
  constexpr double kStart = 20, kMergeRows = 4096;  // rows merged in the time of one block
  constexpr int kMaxSplits = 64;
  const int64_t queries = WideTile::kRows / problem.heads_kv;
  const int64_t q_len = (limits.max_tokens + limits.max_batch - 1) / limits.max_batch;
  const int64_t tiles = limits.max_batch * ((q_len + queries - 1) / queries);
  const int64_t longest = (limits.max_seqlen_k + kBlock - 1) / kBlock;
  const int64_t shortest = std::max<int64_t>(limits.max_seqlen_k - limits.max_seqlen_q, 0) / kBlock;
  const double mean = static_cast<double>(longest + shortest) / 2;
  double best_time = 0;
  int best = 0;
  for (int parts = 1; parts <= kMaxSplits && parts <= longest; ++parts) {
    const auto rounds = static_cast<double>((tiles * parts + kSMs - 1) / kSMs);
    const double blocks = std::max(static_cast<double>(longest), rounds * mean) / parts;
    const double merge =
        parts == 1 ? 0 : 3 + static_cast<double>(limits.max_tokens * problem.heads_kv) / kMergeRows;
    const double time = blocks + rounds * kStart + merge;
    if (best != 0 && time >= best_time) continue;
    best_time = time;
    best = parts;
  }
  return best;
}

constexpr int64_t score_bytes(const Problem& problem, const Limits& limits) {
  return limits.max_tokens * problem.heads_kv * ((limits.max_seqlen_k + kBlock - 1) / kBlock) *
         int64_t{sizeof(float)};
}

/// Whether index_select leaves all block scores in the workspace and chooses afterwards: for few
/// rows, and where parts of a tile would each fill a list of their own while the scores are few
/// enough to stay in L2.
constexpr bool keeps_scores(const Problem& problem, const Limits& limits) {
  return is_narrow(problem, limits) ||
         (splits(problem, limits) > 1 && score_bytes(problem, limits) <= kMostScoreBytes);
}

}  // namespace msa::cuda::sm90::index
