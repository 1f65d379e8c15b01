// Which order a prefill takes: queries walk the union of their lists, or blocks walk their queries
// (KV-outer). Plain arithmetic, for the host and for the device.
#pragma once

#include <cstdint>

#include "cuda/sm90/shape.h"
#include "cuda/sm90/sizes.h"
#include "msa/problem.h"

namespace msa::cuda::sm90::prefill {

/// What is asked for, or what a call is to do. kAuto: the device decides from the lists.
enum class Order { kAuto, kUnion, kKvOuter };

/// A sample of the lists, as the union kernel would walk them.
struct Overlap {
  int32_t executed;  ///< (query, block) products: every block of a warpgroup times its queries
  int32_t useful;    ///< those that a query asked for
};

/// From which overlap (executed / useful) on KV-outer is the faster order. On an H200 the union
/// runs at 590 TFLOP/s executed (8K: 660), hence 590 / overlap useful, and KV-outer at 300 useful
/// (8K: 290) whatever the lists: equal at 2.0 (8K: 2.3; dev/notes/prefill.md).
inline constexpr double kKvOuterFrom = 2.1;

/// What a plan within `limits` does when `asked` for an order.
constexpr Order order_of(Order asked, const Limits& limits) {
  return asked == Order::kAuto && limits.max_tokens <= kFewTokens ? Order::kKvOuter : asked;
}

/// Whether these lists are walked KV-outer. An empty sample is not.
MSA_HOST_DEVICE constexpr bool prefers_kv_outer(const Overlap& measured) {
  return measured.useful > 0 && measured.executed >= kKvOuterFrom * measured.useful;
}

/// Tiles of queries that are looked at, spread evenly over all (tile, head).
inline constexpr int kSampledTiles = 256;

/// The number of sample i, i < kSampledTiles, among `tiles`; -1 where there are fewer.
MSA_HOST_DEVICE constexpr int sampled_tile(int i, int tiles) {
  if (tiles <= kSampledTiles) return i < tiles ? i : -1;
  return static_cast<int>((2 * int64_t{i} + 1) * tiles / (int64_t{2} * kSampledTiles));
}

}  // namespace msa::cuda::sm90::prefill
