// The device side of tasks.h: inverse lists become tasks, CTAs take tasks from a counter, and parts
// are added up.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "cuda/batch.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/backward/tasks.h"
#include "cuda/sm90/prefill/windows.h"

namespace msa::cuda::sm90::backward {

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
struct BlockRange {
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

// ---- making them ----

inline constexpr int kMakeThreads = 512;
inline constexpr int kSizeClasses = 64;

struct MakeTasksArgs {
  DeviceBatch batch;
  InverseLists lists;
  TaskLists out;
  int32_t heads_kv;
  BlockRange blocks{};  ///< that make tasks; all where there are lists
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
    const int each = prefill::task_size(queries, a_.out.task_queries, kTaskUnit);
    return (queries + each - 1) / each;
  }
  /// visit(n, begin, count) for the tasks that the queries of a (head, row) make.
  template <class Visit>
  __device__ void for_each_task(int queries, const Visit& visit) const {
    if (queries == 0) return;
    const int each = prefill::task_size(queries, a_.out.task_queries, kTaskUnit);
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

// ---- taking them ----

/// The tasks of a call, dealt to all CTAs by one counter. One warp; each task is fetched while the
/// one before is worked on.
class TaskQueue {
 public:
  __device__ explicit TaskQueue(const TaskLists& lists) : lists_(lists), count_(*lists.count) {
    take();
    fetch();
  }

  /// A task of no queries when all are taken.
  __device__ Task next() {
    const Task task = ahead_;
    fetch();
    return task;
  }

 private:
  /// Lane 0 takes a number; nobody waits for it here.
  __device__ void take() {
    if (threadIdx.x % 32 == 0) number_ = atomicAdd(lists_.taken, 1);
  }
  __device__ void fetch() {
    const int number = __shfl_sync(0xffffffff, number_, 0);
    ahead_ = {};
    if (number >= count_) return;
    ahead_ = lists_.tasks[number];
    take();
  }

  const TaskLists& lists_;
  const int count_;
  int number_ = 0;
  Task ahead_{};
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

// ---- adding up their parts ----

inline constexpr int kReduceThreads = 256;  // a warp for each row of the output

struct ReduceArgs {
  DeviceBatch batch;
  TaskLists lists;
  const float* parts;         ///< [parts,128,128]
  void* out;                  ///< [S,H,128] as Out: H = Hkv, or 1 when all heads are added
  int64_t out_row, out_head;  ///< strides in elements; rows 16-byte aligned
  int32_t keys;               ///< S
  int32_t heads;              ///< that are added: 1 or Hkv
  float scale;
  BlockRange blocks{};  ///< whose keys are written, nobody's keys with block 0
};

/// Where row k of the keys belongs: row and block of its sequence, key of the block; row -1:
/// nobody's.
struct KeyPlace {
  int row, block, key;
};
__device__ inline KeyPlace place_of_key(const DeviceBatch& batch, const TaskLists& lists, int k) {
  const int b = batch.sequence_of_key(k);
  if (b < 0) return {-1, 0, 0};
  const DeviceSequence s = batch.sequence(b);
  const int token = k - s.k_begin, block = token / kBlock, row = lists.row_begin[b] + block;
  const bool exists = token >= 0 && token < s.kv_len && row < lists.row_begin[b + 1];
  if (!exists) return {-1, 0, 0};
  return {row, block, token % kBlock};
}

__device__ inline void store_columns(const float4& x, float* to) {
  *reinterpret_cast<float4*>(to) = x;
}
__device__ inline void store_columns(const float4& x, __nv_bfloat16* to) {
  auto* pairs = reinterpret_cast<__nv_bfloat162*>(to);
  pairs[0] = __floats2bfloat162_rn(x.x, x.y);
  pairs[1] = __floats2bfloat162_rn(x.z, x.w);
}

/// out[k,h] = scale * sum of the parts of the key's block, for head h = blockIdx.y or for all heads
/// one after the other; zeros for keys that nobody reads.
template <class Out>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_parts(const __grid_constant__ ReduceArgs a) {
  ptx::wait_for_previous_grid();
  const int k = static_cast<int>(blockIdx.x * (kReduceThreads / 32) + threadIdx.x / 32);
  if (k >= a.keys) return;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const KeyPlace place = place_of_key(a.batch, a.lists, k);
  if (!a.blocks.contains(place.block)) return;
  float4 sum{};
  for (int n = 0; place.row >= 0 && n < a.heads; ++n) {
    const int head = static_cast<int>(blockIdx.y) + n;
    const int end = a.lists.end_part(head, place.row);
#pragma unroll 4
    for (int part = a.lists.first_part(head, place.row); part < end; ++part) {
      const float4 x = *reinterpret_cast<const float4*>(
          a.parts + (int64_t{part} * kBlock + place.key) * kDim + lane * 4);
      sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
    }
  }
  sum.x *= a.scale, sum.y *= a.scale, sum.z *= a.scale, sum.w *= a.scale;
  store_columns(sum, static_cast<Out*>(a.out) + k * a.out_row + blockIdx.y * a.out_head + lane * 4);
}

}  // namespace msa::cuda::sm90::backward
