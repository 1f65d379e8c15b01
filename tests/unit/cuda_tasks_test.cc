// How work on blocks of keys is cut into tasks, and where their lists lie. Plain arithmetic, so it
// is tested where there is no GPU.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "cuda/sm90/walk/tasks.h"

namespace msa::cuda::sm90::walk {
namespace {

Limits limits(int64_t tokens, int64_t batch = 1, int64_t kv_len = 0) {
  return {.max_batch = batch,
          .max_tokens = tokens,
          .max_seqlen_q = tokens,
          .max_seqlen_k = kv_len == 0 ? tokens : kv_len};
}
Problem shape(int32_t heads_kv = 4, int32_t topk = 16) {
  Problem p;
  p.heads_kv = heads_kv;
  p.heads_q = 16 * heads_kv;
  p.topk = topk;
  return p;
}

TEST(BackwardTasks, SizesAreWholeTilesAndSharesOfAnSM) {
  for (const bool listed : {false, true}) {
    for (const int64_t tokens : {1, 100, 4096, 1 << 17, 1 << 20}) {
      const TaskLayout l = task_layout(shape(), limits(tokens), listed, 0);
      EXPECT_GE(l.task_queries, kLeastTaskQueries);
      EXPECT_EQ(l.task_queries % kTaskUnit, 0);
    }
  }
  // 131,072 queries of 4 heads and 16 slots are 63,550 for each of 132 SMs.
  EXPECT_EQ(task_layout(shape(), limits(1 << 17), true, 0).task_queries, 7936);
  EXPECT_EQ(task_layout(shape(), limits(1), true, 0).task_queries, kLeastTaskQueries);
}

// Whatever the lists are: rows with n queries make ceil(n / task_queries) tasks or fewer.
TEST(BackwardTasks, ThereIsRoomForAllParts) {
  for (const int64_t tokens : {1, 63, 64, 65, 1000, 5000}) {
    for (const int32_t topk : {1, 5, 16}) {
      const Problem p = shape(2, topk);
      const TaskLayout l = task_layout(p, limits(tokens), true, 0);
      const auto tasks_of = [&](int64_t entries) -> int64_t {
        if (entries == 0) return 0;
        const int each =
            task_size(static_cast<int>(entries), static_cast<int>(l.task_queries), kTaskUnit);
        EXPECT_LE(each, l.task_queries);
        return (entries + each - 1) / each;
      };
      // All entries in one row of a head, or spread as evenly as can be.
      const int64_t entries = tokens * topk;
      EXPECT_LE(p.heads_kv * tasks_of(entries), l.parts);
      int64_t even = 0;
      for (int64_t row = 0; row < l.rows; ++row)
        even += tasks_of(entries / l.rows + (row < entries % l.rows ? 1 : 0));
      EXPECT_LE(p.heads_kv * even, l.parts);
    }
  }
}

TEST(BackwardTasks, PartsOfLongContextsStaySmall) {
  const int64_t part_bytes = int64_t{2} * kBlock * kDim * 4;  // dk and dv
  for (const bool listed : {false, true}) {
    const TaskLayout l = task_layout(shape(), limits(1 << 17), listed, 0);
    EXPECT_EQ(l.rows, 1024);
    EXPECT_LE(l.parts * part_bytes, int64_t{700} << 20);
  }
}

TEST(BackwardTasks, RowsOfManySequencesAreBoundedByTheirSum) {
  // 64 sequences of together 64K tokens: not 64 times the longest that one of them may be.
  const Limits l = limits(1 << 16, 64);
  EXPECT_EQ(most_rows(l), 512 + 64);
  EXPECT_TRUE(has_room(l, 1 << 16, 64));
  EXPECT_TRUE(has_room(l, 1 << 16, 1));
  EXPECT_FALSE(has_room(l, 1 << 20, 64)) << "more keys than the plan knows of";
  EXPECT_TRUE(has_room(limits(100, 1, 1 << 20), 1 << 20, 1)) << "few queries, one long sequence";
  EXPECT_TRUE(has_room(limits(2, 2, 128), 300, 2)) << "keys of nobody take no room";
}

TEST(BackwardTasks, ListsLieApart) {
  const TaskLayout l = task_layout(shape(), limits(1000, 3), true, 512);
  EXPECT_EQ(l.row_begin, 512);
  EXPECT_GE(l.counters, l.row_begin + 4 * 4);
  EXPECT_GE(l.part_ptr, l.counters + 2 * 4);
  EXPECT_GE(l.tasks, l.part_ptr + (4 * l.rows + 1) * 4);
  EXPECT_GE(l.end, l.tasks + l.parts * static_cast<int64_t>(sizeof(Task)));
  for (const int64_t begin : {l.row_begin, l.counters, l.part_ptr, l.tasks, l.end})
    EXPECT_EQ(begin % 256, 0);
}

}  // namespace
}  // namespace msa::cuda::sm90::walk
