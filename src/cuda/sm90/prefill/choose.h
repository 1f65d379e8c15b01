// Which order a prefill takes: queries walk the union of their lists, or blocks walk their queries
// (KV-outer). Plain arithmetic, for the host and for the device.
#pragma once

#include <cstdint>
#include <limits>

#include "msa/problem.h"

#ifdef __CUDACC__
#define MSA_HOST_DEVICE __host__ __device__
#else
#define MSA_HOST_DEVICE
#endif

namespace msa::cuda::sm90::prefill {

/// What is asked for, or what a call is to do. kAuto: the device decides from the lists.
enum class Order { kAuto, kUnion, kKvOuter };

/// A sample of the lists, as the union kernel would walk them.
struct Overlap {
  int32_t executed;  ///< (query, block) products: every block of a warpgroup times its queries
  int32_t useful;    ///< those that a query asked for
};

/// From which overlap (executed / useful) on KV-outer is the faster order; infinite: never, and
/// nothing is measured. The union runs at about 600 TFLOP/s executed, hence 600 / overlap useful;
/// KV-outer at about 325 useful whatever the lists (its traffic, dev/notes/prefill.md): 600 / 325
/// is about 1.9. Infinite until KV-outer has been measured on a device.
inline constexpr double kKvOuterFrom = std::numeric_limits<double>::infinity();  // then 1.9

/// A plan for fewer query rows always takes the union: a block serves few queries, and lists,
/// overlap and merge are launches of their own.
inline constexpr int64_t kLeastKvOuterTokens = 128;

/// What a plan for `problem` within `limits` does when `asked` for an order. `from`: see
/// kKvOuterFrom.
constexpr Order order_of(Order asked, const Limits& limits, double from = kKvOuterFrom) {
  if (asked != Order::kAuto) return asked;
  const bool undecided =
      from < std::numeric_limits<double>::infinity() && limits.max_tokens >= kLeastKvOuterTokens;
  return undecided ? Order::kAuto : Order::kUnion;
}

/// Whether these lists are walked KV-outer. An empty sample is not.
MSA_HOST_DEVICE constexpr bool prefers_kv_outer(const Overlap& measured,
                                                double from = kKvOuterFrom) {
  return measured.useful > 0 && measured.executed >= from * measured.useful;
}

/// Tiles of queries that are looked at, spread evenly over all (tile, head).
inline constexpr int kSampledTiles = 256;

/// The number of sample i, i < kSampledTiles, among `tiles`; -1 where there are fewer.
MSA_HOST_DEVICE constexpr int sampled_tile(int i, int tiles) {
  if (tiles <= kSampledTiles) return i < tiles ? i : -1;
  return static_cast<int>((2 * int64_t{i} + 1) * tiles / (2 * kSampledTiles));
}

}  // namespace msa::cuda::sm90::prefill
