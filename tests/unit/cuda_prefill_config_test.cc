// The decisions of the prefill kernels: which order, which windows, which tasks. Plain arithmetic,
// so it is tested where there is no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <set>
#include <utility>
#include <vector>

#include "cuda/sm90/prefill/order.h"
#include "cuda/sm90/prefill/windows.h"

namespace msa::cuda::sm90::prefill {
namespace {

constexpr int64_t kGiB = int64_t{1} << 30;

Limits limits(int64_t tokens) {
  return {.max_batch = 1, .max_tokens = tokens, .max_seqlen_q = tokens, .max_seqlen_k = tokens};
}
Problem shape(int32_t heads_q, int32_t heads_kv, int32_t topk = 16) {
  Problem p;
  p.heads_q = heads_q;
  p.heads_kv = heads_kv;
  p.topk = topk;
  return p;
}

TEST(PrefillOrder, WhatIsAskedForIsDone) {
  for (const int64_t tokens : {1, 100, 1 << 20}) {
    EXPECT_EQ(order_of(Order::kUnion, limits(tokens)), Order::kUnion);
    EXPECT_EQ(order_of(Order::kKvOuter, limits(tokens)), Order::kKvOuter);
  }
}

TEST(PrefillOrder, AutoAsksTheDeviceOnlyWhereItMatters) {
  EXPECT_EQ(order_of(Order::kAuto, limits(kFewTokens)), Order::kKvOuter);
  EXPECT_EQ(order_of(Order::kAuto, limits(kFewTokens + 1)), Order::kAuto);
}

// Overlaps of dev/notes/prefill.md for tiles of 4 queries: 1.2 to 1.6 of trained lists, 3 to 4 of
// random ones.
TEST(PrefillOrder, ScatteredListsGoKvOuter) {
  EXPECT_FALSE(prefers_kv_outer({.executed = 1560, .useful = 1000}));
  EXPECT_FALSE(prefers_kv_outer({.executed = 2099, .useful = 1000}));
  EXPECT_TRUE(prefers_kv_outer({.executed = 2100, .useful = 1000}));
  EXPECT_TRUE(prefers_kv_outer({.executed = 3900, .useful = 1000}));
  EXPECT_FALSE(prefers_kv_outer({.executed = 0, .useful = 0})) << "no lists at all";
}

TEST(PrefillOrder, SamplesAreDifferentTiles) {
  for (const int tiles : {0, 1, 255, 256, 257, 1000, 16384, 524288, 1 << 30}) {
    std::set<int> seen;
    for (int i = 0; i < kSampledTiles; ++i) {
      const int tile = sampled_tile(i, tiles);
      if (tile < 0) continue;
      EXPECT_LT(tile, tiles);
      EXPECT_TRUE(seen.insert(tile).second) << tile;
    }
    EXPECT_EQ(seen.size(), std::min<size_t>(static_cast<size_t>(tiles), kSampledTiles)) << tiles;
    if (tiles < kSampledTiles) continue;
    EXPECT_LE(*seen.begin(), tiles / kSampledTiles) << "from the start";
    EXPECT_GE(*seen.rbegin(), tiles - 1 - tiles / kSampledTiles) << "to the end";
  }
}

TEST(PrefillWindows, WorkspaceIsBounded) {
  EXPECT_LT(windows(shape(64, 4), limits(1 << 20)).bytes, 2 * kGiB);
  for (const auto& [heads_q, heads_kv] :
       std::vector<std::pair<int, int>>{{16, 1}, {8, 1}, {64, 4}, {64, 8}, {128, 8}, {256, 32}}) {
    for (const int topk : {1, 5, 16}) {
      for (const int64_t tokens : {1, 7, 128, 4095, 4096, 4097, 100000, 1 << 20, 1 << 24}) {
        const Windows w = windows(shape(heads_q, heads_kv, topk), limits(tokens));
        EXPECT_LT(w.bytes, 2 * kGiB) << heads_q << " " << topk << " " << tokens;
        EXPECT_GE(w.tokens, 1);
        EXPECT_LE(w.tokens, std::min(tokens, kMostWindowTokens));
        EXPECT_LE(w.tokens * topk, 1 << 16) << "entries are numbered in 16 bits";
        EXPECT_GE(w.round, 1);
        EXPECT_LE(w.round, (tokens + w.tokens - 1) / w.tokens) << "room for windows that never are";
      }
    }
  }
}

TEST(PrefillWindows, ShortCallsTakeLittle) {
  EXPECT_LT(windows(shape(64, 4), limits(128)).bytes, 40 << 20);
  EXPECT_LT(windows(shape(64, 4), limits(1)).bytes, 1 << 20);
}

TEST(PrefillWindows, AreEqual) {  // 4,097 tokens are not one window of 4,096 and one of 1
  for (const int64_t tokens : {4097, 8193, 100000, 1 << 20}) {
    const int64_t each = windows(shape(64, 4), limits(tokens)).tokens;
    const int64_t count = (tokens + each - 1) / each;
    EXPECT_LT(each * count - tokens, count) << tokens;
  }
}

TEST(PrefillWindows, TasksAreAnEighthOfAnSmsShare) {
  for (const auto& [heads_q, heads_kv] :
       std::vector<std::pair<int, int>>{{16, 1}, {8, 1}, {64, 4}, {64, 8}}) {
    for (const int64_t tokens : {1, 128, 1024, 4096, 1 << 20}) {
      const Windows w = windows(shape(heads_q, heads_kv), limits(tokens));
      EXPECT_EQ(w.task_queries % 8, 0) << "whole tiles";
      EXPECT_GE(w.task_queries, 16);
      EXPECT_LE(w.task_queries, kMostTaskQueries);
      const int64_t share = w.tokens * 16 * heads_kv / kSMs;
      EXPECT_LE(w.task_queries, std::max<int64_t>(16, share / 8)) << tokens;
    }
  }
  EXPECT_EQ(windows(shape(64, 4), limits(1 << 20)).task_queries, 248);
}

TEST(PrefillWindows, TasksOfABlockAreEqual) {
  for (const int tile : {4, 8}) {
    for (const int most : {16, 56, 248, 256}) {
      for (int entries = 1; entries <= 4096; ++entries) {
        const int each = walk::task_size(entries, most, tile), tasks = (entries + each - 1) / each;
        EXPECT_GE(each, 1);
        EXPECT_LE(each, most);
        EXPECT_EQ(each % tile, 0);
        EXPECT_EQ(tasks, (entries + most - 1) / most) << "more blocks are loaded than must be";
      }
    }
  }
  EXPECT_EQ(walk::task_size(250, 248, 4), 128) << "not 248 and 2";
}

/// Bytes [begin, end) that something occupies.
using Range = std::pair<int64_t, int64_t>;

TEST(PrefillWindows, PartsOfTheWorkspaceDoNotMeet) {
  alignas(256) std::byte start[1];  // nothing but addresses is made from it
  const auto base = reinterpret_cast<uintptr_t>(start);
  for (const int64_t tokens : {1, 130, 5000, 70000}) {
    for (const int topk : {3, 16}) {
      const Problem p = shape(16, 2, topk);
      const Windows w = windows(p, limits(tokens));
      const int64_t slots = w.tokens * topk, heads = p.heads_kv;
      std::vector<Range> ranges{{0, static_cast<int64_t>(sizeof(Header))},
                                {w.softmax, w.softmax + slots * p.heads_q * 8},
                                {w.o, w.o + slots * p.heads_q * kDim * 2}};
      for (int64_t i = 0; i < w.round; ++i) {
        const WindowLists lists = window_lists(w, start, heads, topk, i);
        const auto add = [&](const auto* from, int64_t count) {
          const auto begin = static_cast<int64_t>(reinterpret_cast<uintptr_t>(from) - base);
          EXPECT_EQ(begin % static_cast<int64_t>(alignof(decltype(*from))), 0);
          ranges.emplace_back(begin, begin + count * static_cast<int64_t>(sizeof(*from)));
        };
        add(lists.taken, 1);
        add(lists.task_count, heads);
        add(lists.chosen, heads * w.tokens);
        add(lists.entries, heads * slots);
        add(lists.tasks, heads * slots);
      }
      std::sort(ranges.begin(), ranges.end());
      for (size_t i = 1; i < ranges.size(); ++i)
        EXPECT_LE(ranges[i - 1].second, ranges[i].first) << tokens << " " << topk;
      EXPECT_LE(ranges.back().second, w.bytes);
      EXPECT_EQ(w.o % 256, 0);
      EXPECT_EQ(w.softmax % 256, 0);
    }
  }
}

}  // namespace
}  // namespace msa::cuda::sm90::prefill
