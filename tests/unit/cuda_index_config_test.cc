// The tuning decisions of the index kernels: plain arithmetic, so it is tested where there is no
// GPU.
#include "cuda/sm90/index/config.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace msa::cuda::sm90::index {
namespace {

Limits limits(int64_t batch, int64_t q_len, int64_t kv_len) {
  return {.max_batch = batch,
          .max_tokens = batch * q_len,
          .max_seqlen_q = q_len,
          .max_seqlen_k = kv_len};
}

TEST(IndexConfig, LongPrefillIsNotSplit) {
  for (const int64_t n : {32768, 131072, 1048576})
    EXPECT_EQ(splits(Problem{}, limits(1, n, n)), 1) << n;
  EXPECT_EQ(splits(Problem{}, limits(1, 16384, 1048576)), 1);
}

TEST(IndexConfig, FewQueriesOverALongPrefixFillTheDevice) {
  const int parts = splits(Problem{}, limits(1, 1024, 524288));  // 16 tiles
  EXPECT_GT(16 * parts, kSMs * 9 / 10);
  EXPECT_LE(16 * parts, kSMs);
  EXPECT_GT(2 * splits(Problem{}, limits(1, 128, 131072)), kSMs * 9 / 10);
}

TEST(IndexConfig, NoMorePartsThanBlocks) {
  for (int64_t n = 1; n < 3000; n += 77) {
    const int parts = splits(Problem{}, limits(1, std::min<int64_t>(n, 65), n));
    EXPECT_GE(parts, 1);
    EXPECT_LE(parts, (n + kBlock - 1) / kBlock) << n;
  }
}

TEST(IndexConfig, NarrowTilesHoldEveryRowOfASequence) {
  Problem p;
  for (const int heads : {1, 2, 4, 8}) {
    p.heads_kv = heads;
    EXPECT_TRUE(is_narrow(p, limits(3, 64 / heads, 1 << 20))) << heads;
    EXPECT_FALSE(is_narrow(p, limits(3, 64 / heads + 1, 1 << 20))) << heads;
  }
}

TEST(IndexConfig, ScoresAreKeptWhereTheyAreFewAndTilesAreSplit) {
  const Problem p;
  EXPECT_TRUE(keeps_scores(p, limits(1, 1, 1 << 20))) << "narrow";
  EXPECT_TRUE(keeps_scores(p, limits(1, 128, 1 << 17)));
  EXPECT_FALSE(keeps_scores(p, limits(1, 1 << 17, 1 << 17))) << "a whole prefill: not split";
  EXPECT_FALSE(keeps_scores(p, limits(1, 1024, 1 << 20))) << "128 MiB of scores";
}

// Sequence b's tiles begin at q_begin / queries + b: they never meet the next sequence's.
TEST(IndexConfig, TileNumbersDoNotOverlap) {
  const int queries = 64;
  int64_t begin = 0, next = 0;
  const int64_t lengths[] = {1, 63, 64, 65, 0, 127, 128, 129, 1000, 0, 0, 7};
  int64_t b = 0;
  for (const int64_t length : lengths) {
    EXPECT_GE(begin / queries + b, next);
    next = begin / queries + b + (length + queries - 1) / queries;
    begin += length;
    ++b;
  }
  EXPECT_LE(next, tile_numbers(begin, b, queries));
}

}  // namespace
}  // namespace msa::cuda::sm90::index
