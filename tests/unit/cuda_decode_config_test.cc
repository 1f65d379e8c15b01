// The tuning decision of the decode kernels, without a GPU.
#include <gtest/gtest.h>

#include <cstdint>

#include "cuda/sm90/decode/config.h"

namespace msa::cuda::sm90::decode {
namespace {

TEST(DecodeConfig, ClustersAreTheMeasuredBest) {  // dev/notes/decode.md
  EXPECT_EQ(cluster_size(1, 4), 16u);             // 6.5 us; 8 CTAs 6.7
  EXPECT_EQ(cluster_size(4, 4), 8u);              // 8.9; 16 CTAs 13.5
  EXPECT_EQ(cluster_size(8, 4), 4u);              // 14.8; 8 CTAs 19.4
  EXPECT_EQ(cluster_size(32, 4), 1u);             // 37.0; 2 CTAs 37.7
}

TEST(DecodeConfig, EveryCtaHasAnSm) {
  for (int64_t tokens = 1; tokens <= 1024; ++tokens) {
    for (int64_t heads : {1, 2, 4, 8}) {
      const int64_t size = cluster_size(tokens, heads);
      EXPECT_TRUE(size == 1 || size * tokens * heads <= kSMs) << tokens << " " << heads;
      EXPECT_LE(size, 16);
      EXPECT_EQ(size & (size - 1), 0) << "not a power of two";
    }
  }
}

}  // namespace
}  // namespace msa::cuda::sm90::decode
