// The thread team: every task once, a worker's number in range, many loops of many sizes.
#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

#include "msa/backend.h"

namespace msa {
namespace {

TEST(Threads, CountIsWhatWasAskedFor) {
  EXPECT_EQ(Threads(1).count(), 1);
  EXPECT_EQ(Threads(5).count(), 5);
  EXPECT_GE(Threads(0).count(), 1);
}

/// No room for the stack of another thread.
TEST(Threads, ASmallerTeamWhereTheSystemRefuses) {
  pthread_attr_t usual, huge;
  ASSERT_EQ(pthread_getattr_default_np(&usual), 0);
  ASSERT_EQ(pthread_attr_init(&huge), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&huge, size_t{1} << 50), 0);
  ASSERT_EQ(pthread_setattr_default_np(&huge), 0);
  Threads threads(4);
  ASSERT_EQ(pthread_setattr_default_np(&usual), 0);
  EXPECT_EQ(threads.count(), 1);
  int64_t sum = 0;
  threads.parallel_for(100, [&](int64_t task, int) { sum += task; });
  EXPECT_EQ(sum, 4950);
  pthread_attr_destroy(&huge);
  pthread_attr_destroy(&usual);
}

TEST(Threads, EveryTaskRunsOnceInEveryLoop) {
  for (int count : {1, 2, 3, 8}) {
    Threads threads(count);
    for (int64_t tasks = 0; tasks < 200; tasks += 1 + tasks / 3) {
      for (int repeat = 0; repeat < 20; ++repeat) {
        std::vector<int> done(static_cast<size_t>(tasks), 0);  // no atomics: one writer each
        std::atomic<int> strangers{0};
        threads.parallel_for(tasks, [&](int64_t task, int worker) {
          ++done[static_cast<size_t>(task)];
          if (worker < 0 || worker >= count) ++strangers;
        });
        ASSERT_EQ(strangers, 0);
        for (int n : done) ASSERT_EQ(n, 1);
      }
    }
  }
}

TEST(Threads, WorkersOwnTheirScratch) {
  // What a worker adds to its own sum without synchronisation adds up.
  Threads threads(4);
  std::vector<int64_t> sums(4 * 16, 0);
  for (int repeat = 0; repeat < 100; ++repeat)
    threads.parallel_for(
        50, [&](int64_t task, int worker) { sums[static_cast<size_t>(worker) * 16] += task; });
  EXPECT_EQ(std::accumulate(sums.begin(), sums.end(), int64_t{0}), 100 * (49 * 50 / 2));
}

TEST(Threads, ResultsOfALoopAreVisibleInTheNext) {
  Threads threads(3);
  std::vector<int64_t> values(257, 1);
  const auto n = static_cast<int64_t>(values.size());
  for (int step = 0; step < 300; ++step) {
    std::vector<int64_t> next(values.size());
    threads.parallel_for(n, [&](int64_t i, int) {
      next[static_cast<size_t>(i)] = values[static_cast<size_t>((i + 1) % n)] + 1;
    });
    values.swap(next);
  }
  for (int64_t value : values) ASSERT_EQ(value, 301);
}

TEST(Threads, TeamsInsideTeams) {
  Threads outer(3);
  std::vector<int64_t> sums(6, 0);
  outer.parallel_for(6, [&](int64_t i, int) {
    Threads inner(2);
    std::atomic<int64_t> sum{0};
    inner.parallel_for(i * 10, [&](int64_t task, int) { sum += task; });
    sums[static_cast<size_t>(i)] = sum;
  });
  for (int64_t i = 0; i < 6; ++i)
    EXPECT_EQ(sums[static_cast<size_t>(i)], i * 10 * (i * 10 - 1) / 2);
}

TEST(Threads, DifferentCallersOneAfterTheOther) {
  Threads threads(3);
  int64_t total = 0;
  for (int caller = 0; caller < 10; ++caller) {
    std::thread([&] {
      std::atomic<int64_t> sum{0};
      threads.parallel_for(100, [&](int64_t task, int) { sum += task; });
      total += sum;
    }).join();
  }
  EXPECT_EQ(total, 10 * 4950);
}

TEST(Threads, UnusedTeamsEnd) {
  for (int i = 0; i < 50; ++i) Threads threads(4);
}

}  // namespace
}  // namespace msa
