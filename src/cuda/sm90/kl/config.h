// Sizes of the kernels of the index branch in training.
#pragma once

#include "cuda/sm90/walk/config.h"

namespace msa::cuda::sm90::kl {

using walk::kConsumerRegisters, walk::kProducerRegisters;
using walk::kThreads, walk::kTileRows, walk::kWarpgroups;

// The KL: a step is 16 queries, the inner dimension of one product. Their rows (queries x heads of
// a group) come in tiles of 64.
inline constexpr int kStepQueries = 16;
inline constexpr int kGatherWarps = 3;  ///< that fetch what steps need beside q, by turns
inline constexpr int kBlockStages = 2;  ///< index keys, 32 KB; keys go to registers at once
inline constexpr int kTileStages = 6;   ///< tiles of queries, 16 KB
inline constexpr int kStepStages = 3;   ///< index queries, 4 KB, and LSEs

// The LSE of the index logits: a warp has 16 queries.
inline constexpr int kLseThreads = 256;
inline constexpr int kWarpQueries = 16;

inline constexpr int kMergeThreads = 256;

}  // namespace msa::cuda::sm90::kl
