// How large the pieces are that the tuned families cut calls into. Any numbers give right results,
// these are fast; tests/emulator has small ones, with which short calls come to every cut.
#pragma once

#include <cstdint>

namespace msa::cuda::sm90 {

inline constexpr int kSMs = 132;  ///< of an H100 or H200; others are served, less evenly

namespace prefill {
/// A window's partial results take no more than this: 1.25 GiB.
inline constexpr int64_t kPartBytes = int64_t{5} << 28;
/// Windows whose lists one launch builds.
inline constexpr int64_t kRoundWindows = 8;
/// Blocks of a sequence that are sorted in one pass: 2M tokens.
inline constexpr int kTableBlocks = 1 << 14;
/// A plan for no more query rows always goes KV-outer: tiles of queries are too few to load the
/// SMs, and reading the blocks is what takes time.
inline constexpr int64_t kFewTokens = 128;
}  // namespace prefill

namespace dense {
inline constexpr int kMaxCtas = 144;  // SMs of a whole GH100
}  // namespace dense

namespace index {
/// Scores up to this size wait in the workspace for the choice: they stay in L2.
inline constexpr int64_t kMostScoreBytes = int64_t{32} << 20;
}  // namespace index

}  // namespace msa::cuda::sm90
