// Who reads a block, and where what a task finds out about an entry has its place.
#pragma once

#include <cstdint>

#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/walk/tasks.cuh"

namespace msa::cuda::sm90::kl {

using walk::Task;

/// A query that reads a task's block.
struct Reader {
  int row;   ///< of the queries, -1: there is none
  int part;  ///< of its entry, counted in [Hkv,T,slots]
};

/// Tasks and their readers; by value into kernels.
struct Readers {
  walk::TaskLists tasks;
  walk::InverseLists lists;
  int32_t tokens;  ///< T
  int32_t slots;   ///< places of a (head, query): K, without lists kMostSlots

  /// Reader n of a task, none behind its last one.
  __device__ Reader at(const Task& task, int n) const {
    if (n >= task.count) return {-1, -1};
    const int row = walk::query_of(task, lists, n);
    if (row < 0) return {-1, -1};
    const int entry = lists.entries != nullptr
                          ? lists.entries[task.head * lists.entries_stride + task.begin + n]
                          : row * kMostSlots + task.block % kMostSlots;
    return {row, task.head * tokens * slots + entry};
  }
};

}  // namespace msa::cuda::sm90::kl
