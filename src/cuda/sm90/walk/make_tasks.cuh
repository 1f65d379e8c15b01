// Inverse lists become tasks (tasks.h).
#pragma once

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "cuda/batch.cuh"
#include "cuda/sm90/walk/tasks.cuh"

namespace msa::cuda::sm90::walk {

inline constexpr int kMakeThreads = 512;
inline constexpr int kSizeClasses = 64;

struct MakeTasksArgs {
  DeviceBatch batch;
  InverseLists lists;
  TaskLists out;
  int32_t heads_kv;
  Round blocks{};  ///< that make tasks; all where there are lists
};

/// One CTA: rows of all heads, a thread each. Nobody checked row_ptr, so sums may be absurd; what
/// exceeds the room for parts is left out.
class TaskMaker {
 public:
  using Scan = cub::BlockScan<int64_t, kMakeThreads>;
  struct Shared {
    int sizes[kSizeClasses];  ///< tasks of each size, largest first; then where the next one goes
    Scan::TempStorage scan;
  };

  __device__ TaskMaker(const MakeTasksArgs& args, Shared& shared) : a_(args), shared_(shared) {}

  __device__ void run() {
    if (thread() < kSizeClasses) shared_.sizes[thread()] = 0;
    number_rows();
    number_parts();
    if (thread() == 0) begin_sizes();
    __syncthreads();
    for (int i = thread(); i < pairs(); i += kMakeThreads) write_tasks(i);
  }

 private:
  /// The queries of a (head, row).
  struct Queries {
    int begin = 0, count = 0;
  };

  static __device__ int thread() { return static_cast<int>(threadIdx.x); }
  __device__ int pairs() const { return a_.heads_kv * a_.out.rows; }

  /// The sum of `own` over the threads ahead of this one; *total grows by that over all.
  __device__ int64_t sum_before(int64_t own, int64_t* total) {
    int64_t before = 0, all = 0;
    Scan(shared_.scan).ExclusiveSum(own, before, all);
    __syncthreads();
    before += *total;
    *total += all;
    return before;
  }
  static __device__ int at_most(int64_t value, int most) {
    return static_cast<int>(value < most ? value : most);
  }

  __device__ void number_rows() {
    int64_t total = 0;
    for (int b0 = 0; b0 < a_.batch.sequences; b0 += kMakeThreads) {
      const int b = b0 + thread();
      const int own = b < a_.batch.sequences ? a_.batch.sequence(b).blocks(kBlock) : 0;
      const int64_t before = sum_before(own, &total);
      if (b < a_.batch.sequences) a_.out.row_begin[b] = at_most(before, a_.out.rows);
    }
    if (thread() == 0) a_.out.row_begin[a_.batch.sequences] = at_most(total, a_.out.rows);
    __syncthreads();
  }

  __device__ void number_parts() {
    int64_t total = 0;
    for (int i0 = 0; i0 < pairs(); i0 += kMakeThreads) {
      const int i = i0 + thread();
      const int entries = i < pairs() ? queries_of(i / a_.out.rows, i % a_.out.rows).count : 0;
      const int64_t before = sum_before(tasks_of(entries), &total);
      if (i < pairs()) a_.out.part_ptr[i] = at_most(before, a_.out.parts);
      for_each_task(entries, [&](int n, int, int count) {
        if (before + n < a_.out.parts) atomicAdd(&shared_.sizes[size_class(count)], 1);
      });
    }
    if (thread() == 0) {
      *a_.out.count = a_.out.part_ptr[pairs()] = at_most(total, a_.out.parts);
      *a_.out.taken = 0;
    }
    __syncthreads();
  }
  __device__ void begin_sizes() {
    int before = 0;
    for (int& size : shared_.sizes) {
      const int own = size;
      size = before;
      before += own;
    }
  }

  __device__ void write_tasks(int i) {
    const int head = i / a_.out.rows, row = i % a_.out.rows;
    const int first = a_.out.part_ptr[i], room = a_.out.part_ptr[i + 1] - first;
    if (room == 0) return;
    const int b = sequence_of_row(row);
    const DeviceSequence s = a_.batch.sequence(b);
    const int block = row - a_.out.row_begin[b];
    const int64_t before = int64_t{block} * kBlock;
    constexpr int64_t kFar = 1 << 30;  // more than any row or position
    const int64_t seen =
        a_.batch.causal ? first_position(s) - s.q_begin + 1 - before : int64_t{kBlock};
    Task task{.source = s.k_begin + static_cast<int>(before),
              .keys = at_most(s.kv_len - before, kBlock),
              .head = head,
              .q_begin = s.q_begin,
              .q_end = s.q_begin + s.q_len,
              .seen = at_most(seen < -kFar ? -kFar : seen, kFar),
              .block = block};
    const Queries queries = queries_of(head, row);
    for_each_task(queries.count, [&](int n, int begin, int count) {
      if (n >= room) return;
      task.begin = queries.begin + begin;
      task.count = count;
      task.part = first + n;
      a_.out.tasks[atomicAdd(&shared_.sizes[size_class(count)], 1)] = task;
    });
  }

  /// The last sequence that begins at or before the row, which has a part: so it is the row's.
  __device__ int sequence_of_row(int row) const {
    int low = 0, high = a_.batch.sequences;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (a_.out.row_begin[middle] <= row ? low : high) = middle;
    }
    return low;
  }
  /// Position of query 0, counted from the first given key.
  static __device__ int64_t first_position(const DeviceSequence& s) {
    return int64_t{s.pos0} - int64_t{s.block0} * kBlock;
  }

  /// None for rows that do not exist.
  __device__ Queries queries_of(int head, int row) const {
    if (row >= a_.out.row_begin[a_.batch.sequences]) return {};
    if (a_.lists.entries != nullptr) {
      if (row >= a_.lists.rows) return {};
      const int32_t* ends = a_.lists.row_ptr + head * a_.lists.row_ptr_stride + row;
      const int entries = a_.batch.tokens * a_.lists.topk;
      const int begin = a_.batch.clamp(ends[0], 0, entries);
      return {begin, a_.batch.clamp(ends[1], begin, entries) - begin};
    }
    const int b = sequence_of_row(row), block = row - a_.out.row_begin[b];
    if (!a_.blocks.contains(block)) return {};
    const DeviceSequence s = a_.batch.sequence(b);
    const int64_t before = int64_t{block} * kBlock;
    const int64_t hidden = a_.batch.causal ? before - first_position(s) : 0;
    const int first = at_most(hidden < 0 ? 0 : hidden, s.q_len);
    return {s.q_begin + first, s.q_len - first};
  }

  __device__ int tasks_of(int queries) const {
    if (queries == 0) return 0;
    const int each = task_size(queries, a_.out.task_queries, kTaskUnit);
    return (queries + each - 1) / each;
  }
  /// visit(n, begin, count) for the tasks that the queries of a (head, row) make.
  template <class Visit>
  __device__ void for_each_task(int queries, const Visit& visit) const {
    if (queries == 0) return;
    const int each = task_size(queries, a_.out.task_queries, kTaskUnit);
    for (int n = 0, begin = 0; begin < queries; ++n, begin += each)
      visit(n, begin, min(each, queries - begin));
  }
  __device__ int size_class(int count) const {
    return kSizeClasses - 1 -
           static_cast<int>(int64_t{count - 1} * kSizeClasses / a_.out.task_queries);
  }

  const MakeTasksArgs& a_;
  Shared& shared_;
};

/// One CTA. Static, as several files of kernels have it.
static __global__ void __launch_bounds__(kMakeThreads)
    make_tasks(const __grid_constant__ MakeTasksArgs args) {
  __shared__ TaskMaker::Shared shared;
  TaskMaker(args, shared).run();
}

}  // namespace msa::cuda::sm90::walk
