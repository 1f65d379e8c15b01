// The device side of tasks.h: lists of tasks and of the queries that read a block.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/walk/tasks.h"
#include "cuda/sm90/walk/work_queue.cuh"

namespace msa::cuda::sm90::walk {

/// Block lists turned round, as block_lists makes them, or (entries null) nothing: every query
/// reads every block that it sees.
struct InverseLists {
  const int32_t* row_ptr;                  ///< [Hkv,rows+1]
  const int32_t* entries;                  ///< [Hkv,T*K]: token * K + slot
  int64_t row_ptr_stride, entries_stride;  ///< from one head to the next
  int32_t rows;
  int32_t topk;  ///< K
};

/// Blocks of every sequence: all, or those of a round.
struct Round {
  int32_t first = 0;
  int32_t count = INT32_MAX;

  __device__ bool contains(int block) const { return block >= first && block - first < count; }
};

/// The lists of a TaskLayout.
struct TaskLists {
  int32_t* row_begin;  ///< [B+1]
  int32_t* count;      ///< tasks in all
  int32_t* taken;      ///< so far
  int32_t* part_ptr;   ///< [Hkv*rows+1]
  Task* tasks;
  int32_t rows;   ///< room for so many
  int32_t parts;  ///< likewise
  int32_t task_queries;

  /// Parts begin .. end-1 of a (head, row).
  __device__ int first_part(int head, int row) const { return part_ptr[head * rows + row]; }
  __device__ int end_part(int head, int row) const { return part_ptr[head * rows + row + 1]; }
};

inline TaskLists task_lists(const TaskLayout& layout, std::byte* workspace) {
  auto* counters = reinterpret_cast<int32_t*>(workspace + layout.counters);
  return {.row_begin = reinterpret_cast<int32_t*>(workspace + layout.row_begin),
          .count = counters,
          .taken = counters + 1,
          .part_ptr = reinterpret_cast<int32_t*>(workspace + layout.part_ptr),
          .tasks = reinterpret_cast<Task*>(workspace + layout.tasks),
          .rows = static_cast<int32_t>(layout.rows),
          .parts = static_cast<int32_t>(layout.parts),
          .task_queries = static_cast<int32_t>(layout.task_queries)};
}

/// The tasks of a call, for a WorkQueue.
struct TaskSource {
  using Work = Task;
  const TaskLists& lists;
  const int count;

  __device__ explicit TaskSource(const TaskLists& lists) : lists(lists), count(*lists.count) {}

  __device__ int* counter() const { return lists.taken; }
  __device__ bool read(int number, Task* task) const {
    if (number >= count) return false;
    *task = lists.tasks[number];
    return true;
  }
};

/// The query row of entry n of a task, or -1 if nobody's row stands there.
__device__ inline int query_of(const Task& task, const InverseLists& lists, int n) {
  if (lists.entries == nullptr) return task.begin + n;
  const int entry = lists.entries[task.head * lists.entries_stride + task.begin + n];
  const int row = entry < 0 ? -1 : entry / lists.topk;
  return row >= task.q_begin && row < task.q_end ? row : -1;
}
/// How many of the block's keys it sees.
__device__ inline int keys_seen(const Task& task, int row) {
  return max(0, min(task.keys, task.seen + row));
}

}  // namespace msa::cuda::sm90::walk
