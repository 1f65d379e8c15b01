// placeholder
#pragma once
#include <cstdint>
#include "cuda/sm90/kl/config.h"
namespace msa::cuda::sm90::kl {
struct alignas(16) Task { int32_t source, keys, head, begin, count, q_begin, q_end, seen, block, part; };
struct Reader { int row, slot; };
struct Readers {
  const Task* tasks; const int32_t* task_count; int32_t* taken;
  const int32_t* entries; int64_t entries_head; int topk, tokens;
  __device__ Reader at(const Task& task, int i) const {
    if (i >= task.count) return {-1, 0};
    int row = task.begin + i, slot = task.block % kSlots;
    if (entries != nullptr) { const int e = entries[task.head * entries_head + row]; row = e / topk; slot = e % topk; }
    return row >= task.q_begin && row < task.q_end ? Reader{row, slot} : Reader{-1, 0};
  }
};
__device__ inline int seen_keys(const Task& t, int row) { return min(max(t.seen + row, 0), t.keys); }
class TaskQueue {
 public:
  __device__ explicit TaskQueue(const Readers& r) : r_(r) {}
  __device__ Task next() {
    int n = 0;
    if (threadIdx.x % 32 == 0) n = atomicAdd(r_.taken, 1);
    n = __shfl_sync(0xffffffff, n, 0);
    Task t{};
    if (n < *r_.task_count) t = r_.tasks[n];
    return t;
  }
  const Readers& r_;
};
}
