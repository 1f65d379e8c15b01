// The inverse of the block lists of a window, per KV head: for every block the (query, slot) pairs
// that chose it, cut into tasks. A CTA per (window, head) sorts by counting, in shared memory.
//
// Entries of a block, and tasks of a size, stand in no particular order. No result depends on it:
// every (query, slot) has a row of its own in a product, and a place of its own for its result.
#pragma once

#include <cub/block/block_scan.cuh>

#include "cuda/ptx/shared.cuh"
#include "cuda/sm90/prefill/operands.cuh"
#include "cuda/sm90/prefill/windows.h"

namespace msa::cuda::sm90::prefill {

inline constexpr int kListThreads = 1024;

struct ListsArgs {
  DeviceBatch batch;
  Lists lists;
  Windows windows;
  std::byte* workspace;
  int first_window;  ///< of the round; blockIdx.x counts from it, blockIdx.y is the KV head
  int heads_kv;      ///< Hkv
  int tile_queries;  ///< queries of a 64-row tile
  bool measured;     ///< only if Header::overlap asks for KV-outer
};

/// Whether the device decided for KV-outer, where it was left to decide.
__device__ inline bool kv_outer_wanted(bool measured, const std::byte* workspace) {
  return !measured || prefers_kv_outer(reinterpret_cast<const Header*>(workspace)->overlap);
}

class ListBuilder {
 public:
  using Scan = cub::BlockScan<int, kListThreads>;
  struct Shared {
    int table[kTableBlocks];    ///< of each block: its entries, then where the next one goes
    int sizes[kMostTaskTiles];  ///< of each size in tiles, largest first: the same for tasks
    int tasks;                  ///< of this pass
    Scan::TempStorage scan;
  };

  __device__ ListBuilder(const ListsArgs& args, Shared& shared)
      : a_(args),
        shared_(shared),
        head_(static_cast<int>(blockIdx.y)),
        topk_(args.lists.topk),
        begin_((args.first_window + static_cast<int>(blockIdx.x)) *
               static_cast<int>(args.windows.tokens)),
        end_(min(begin_ + static_cast<int>(args.windows.tokens), args.batch.tokens)),
        out_(window_lists(args.windows, args.workspace, args.heads_kv, args.lists.topk,
                          blockIdx.x)) {
    out_.chosen += head_ * args.windows.tokens;
    out_.entries += head_ * args.windows.tokens * topk_;
    out_.tasks += head_ * args.windows.tokens * topk_;
  }

  __device__ void run() {
    for (int t = begin_ + thread(); t < end_; t += kListThreads) out_.chosen[t - begin_] = 0;
    __syncthreads();
    for (int t = begin_; t < end_;) {  // every row once, whatever the lengths say
      const int b = a_.batch.sequence_of(t);
      if (b < 0) break;  // padding up to the end
      const DeviceSequence s = a_.batch.sequence(b);
      const bool is_row = t >= s.q_begin && t < s.q_begin + s.q_len;
      const int stop = is_row ? min(end_, s.q_begin + s.q_len) : t + 1;
      const int blocks = is_row ? s.blocks(kBlock) : 0;
      for (int first = 0; first < blocks; first += kTableBlocks)
        add(s, t, stop, first, min(blocks - first, kTableBlocks));
      t = stop;
    }
    if (thread() == 0) {
      out_.task_count[head_] = tasks_;
      if (head_ == 0) *out_.taken = 0;
    }
  }

 private:
  static __device__ int thread() { return static_cast<int>(threadIdx.x); }

  /// Lists and tasks of blocks first .. first+blocks-1 of s for its query rows begin .. end-1.
  __device__ void add(const DeviceSequence& s, int begin, int end, int first, int blocks) {
    for (int j = thread(); j < blocks; j += kListThreads) shared_.table[j] = 0;
    if (thread() < kMostTaskTiles) shared_.sizes[thread()] = 0;
    __syncthreads();
    for_each_slot(s, begin, end, [&](int row, int slot, int block) {
      const uint32_t lanes = __ballot_sync(0xffffffff, block >= 0) >> (thread() % 32 - slot);
      if (first == 0 && slot == 0 && row < end)
        out_.chosen[row - begin_] = static_cast<uint16_t>(lanes);
      if (block >= first && block < first + blocks) atomicAdd(&shared_.table[block - first], 1);
    });
    __syncthreads();
    for (int j = thread(); j < blocks; j += kListThreads)
      for_each_part(shared_.table[j],
                    [&](int, int count) { atomicAdd(&shared_.sizes[size_class(count)], 1); });
    __syncthreads();
    begin_sizes();
    const int entries = begin_blocks(s, first, blocks);
    __syncthreads();
    for_each_slot(s, begin, end, [&](int row, int slot, int block) {
      if (block < first || block >= first + blocks) return;
      const int at = atomicAdd(&shared_.table[block - first], 1);
      out_.entries[at] = static_cast<Entry>((row - begin_) * kMostSlots + slot);
    });
    entries_ += entries;
    tasks_ += shared_.tasks;
    __syncthreads();  // the next pass clears what this one has read
  }

  /// visit(row, slot, block) for all slots of query rows begin .. end-1 of s; block -1: not chosen.
  /// Whole warps together: rows that do not exist have no block.
  template <class Visit>
  __device__ void for_each_slot(const DeviceSequence& s, int begin, int end, const Visit& visit) {
    const int slots = (end - begin) * kMostSlots;
    for (int i = thread(); i - thread() % 32 < slots; i += kListThreads) {
      const int row = begin + i / kMostSlots;
      const bool exists = row < end;
      const int visible = exists ? s.visible(row - s.q_begin, kBlock, a_.batch.causal) : 0;
      visit(row, i % kMostSlots,
            chosen_block(a_.batch, a_.lists, s, head_, exists ? row : -1, visible));
    }
  }

  /// visit(first, count) for the tasks that `entries` of a block make: equal ones, whole tiles.
  template <class Visit>
  __device__ void for_each_part(int entries, const Visit& visit) const {
    if (entries == 0) return;
    const int each =
        walk::task_size(entries, static_cast<int>(a_.windows.task_queries), a_.tile_queries);
    for (int i = 0; i < entries; i += each) visit(i, min(each, entries - i));
  }
  /// Largest first.
  __device__ int size_class(int count) const {
    return kMostTaskTiles - (count + a_.tile_queries - 1) / a_.tile_queries;
  }

  /// Numbers of tasks of each size become the place of the first one.
  __device__ void begin_sizes() {
    int own = thread() < kMostTaskTiles ? shared_.sizes[thread()] : 0;
    int all = 0;
    Scan(shared_.scan).ExclusiveSum(own, own, all);
    if (thread() < kMostTaskTiles) shared_.sizes[thread()] = tasks_ + own;
    if (thread() == 0) shared_.tasks = all;
    __syncthreads();
  }

  /// Numbers of entries of each block become the place of the first one; writes the tasks. Returns
  /// the number of entries.
  __device__ int begin_blocks(const DeviceSequence& s, int first, int blocks) {
    int total = 0;
    for (int j0 = 0; j0 < blocks; j0 += kListThreads) {
      const int j = j0 + thread();
      const int own = j < blocks ? shared_.table[j] : 0;
      int before = 0, all = 0;
      Scan(shared_.scan).ExclusiveSum(own, before, all);
      __syncthreads();
      const int at = entries_ + total + before;
      if (j < blocks) shared_.table[j] = at;
      if (own > 0) write_tasks(s, first + j, at, own);
      total += all;
    }
    return total;
  }
  __device__ void write_tasks(const DeviceSequence& s, int block, int begin, int entries) {
    const int64_t before = int64_t{block} * kBlock;
    // What the query at row 0 of the window would see of the block.
    const int64_t seen = a_.batch.causal ? int64_t{s.pos0} + begin_ - s.q_begin + 1 -
                                               int64_t{s.block0} * kBlock - before
                                         : kBlock;
    const WindowTask task{
        .source =
            s.pages != nullptr ? a_.batch.page(s, block) : s.k_begin + static_cast<int>(before),
        .head = head_,
        .begin = 0,
        .count = 0,
        .seen = static_cast<int16_t>(max(min(seen, int64_t{kBlock}), -int64_t{kMostWindowTokens})),
        .keys = static_cast<uint16_t>(min(s.kv_len - before, int64_t{kBlock}))};
    for_each_part(entries, [&](int i, int count) {
      WindowTask& to = out_.tasks[atomicAdd(&shared_.sizes[size_class(count)], 1)];
      to = task;
      to.begin = static_cast<uint16_t>(begin + i);
      to.count = static_cast<uint16_t>(count);
    });
  }

  const ListsArgs& a_;
  Shared& shared_;
  const int head_, topk_;
  const int begin_, end_;        ///< query rows of the window
  WindowLists out_;              ///< this head's
  int entries_ = 0, tasks_ = 0;  ///< written so far
};

__global__ void __launch_bounds__(kListThreads)
    build_lists(const __grid_constant__ ListsArgs args) {
  if (!kv_outer_wanted(args.measured, args.workspace)) return;
  ListBuilder(args, *reinterpret_cast<ListBuilder::Shared*>(ptx::dynamic_shared)).run();
}

}  // namespace msa::cuda::sm90::prefill
