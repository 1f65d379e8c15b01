// Sizes of the kernels of the index branch in training.
#pragma once

namespace msa::cuda::sm90::kl {

inline constexpr int kBlock = 128;  ///< Bk
inline constexpr int kDim = 128;    ///< D and Di
/// Largest K; and without lists the blocks of a round, whose slot is their number mod kSlots.
inline constexpr int kSlots = 16;

// The KL: a step is 16 queries, the inner dimension of one product. Their rows (queries x heads of
// a group) come in tiles of 64.
inline constexpr int kStepQueries = 16;
inline constexpr int kTileRows = 64;
inline constexpr int kWarpgroups = 2;   ///< that compute, 64 keys of the block each
inline constexpr int kGatherWarps = 3;  ///< that fetch what steps need beside q, by turns
inline constexpr int kBlockStages = 2;  ///< index keys, 32 KB; keys go to registers at once
inline constexpr int kTileStages = 6;   ///< tiles of queries, 16 KB
inline constexpr int kStepStages = 3;   ///< index queries, 4 KB, and LSEs
inline constexpr int kThreads = 128 * (1 + kWarpgroups);

// 65,536 registers: 224 for each computing thread leave 56 for those that load.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 224;
static_assert(128 * (kProducerRegisters + kWarpgroups * kConsumerRegisters) <= 65536);

// The LSE of the index logits: a warp has 16 queries.
inline constexpr int kLseThreads = 256;
inline constexpr int kWarpQueries = 16;

inline constexpr int kMergeThreads = 256;

}  // namespace msa::cuda::sm90::kl
