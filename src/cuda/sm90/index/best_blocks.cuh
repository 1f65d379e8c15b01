// The sink of block scores that keeps the best ones of each row.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/index/arguments.cuh"
#include "cuda/topk.cuh"

namespace msa::cuda::sm90::index {

/// The K best blocks of each row, ids ascending. A thread keeps its row's list in shared memory,
/// best first; of equal scores the earlier stays ahead, and blocks come in ascending order.
template <class Shape>
class BestBlocks {
 public:
  struct Storage {
    uint4 pairs[kList / 2][128 * Shape::kWarpgroups];  // two entries each: key, id, key, id
  };

  __device__ BestBlocks(Storage& storage, const ScoreArguments& a)
      : list_(&storage.pairs[0][threadIdx.x]), a_(a) {}

  /// `row` of the unit's tile is the thread's, -1 for none.
  __device__ void begin(const Unit& unit, int row) {
    lowest_ = kForcedOrder;
    if (!has(unit, row)) return;
    range_ = range(unit, row);
    lowest_ = kNoOrder;
    for (int i = 0; i < kList / 2; ++i) pairs(i) = {kNoOrder, ~0U, kNoOrder, ~0U};
  }

  __device__ void take(const Unit& unit, int block, float score) {
    const uint32_t order = order_of(score);
    if (order > lowest_ && block >= range_.first && block < range_.end)
      insert(order, unit.block0 + block);
  }

  __device__ void end(const Unit& unit, int row) {
    if (!has(unit, row)) return;
    // The first part of a tile's blocks brings the forced ones of the start, the last the others.
    const Candidates blocks = range(unit, row);
    const int from = unit.split == 0 ? 0 : blocks.first;
    const int to = unit.split == a_.grid.splits - 1 ? blocks.forced() : blocks.first;
    for (int i = from; i < to; ++i) insert(kForcedOrder, unit.block0 + blocks.forced_block(i));

    const int topk = a_.grid.selection.topk;
    Entry best[kList];
#pragma unroll
    for (int i = 0; i < kList; i += 2) {
      const uint4 pair = pairs(i / 2);
      best[i] = i < topk ? Entry{pair.x, static_cast<int32_t>(pair.y)} : Entry{kNoOrder, -1};
      best[i + 1] =
          i + 1 < topk ? Entry{pair.z, static_cast<int32_t>(pair.w)} : Entry{kNoOrder, -1};
    }
#pragma unroll
    for (int i = 0; i < kList; ++i) {
      int place = 0;  // as many as have a lower id; -1 is behind all
#pragma unroll
      for (int j = 0; j < kList; ++j)
        place += static_cast<uint32_t>(best[j].id) < static_cast<uint32_t>(best[i].id);
      store(unit, row, best[i].id >= 0 ? place : i, best[i]);
    }
  }

 private:
  __device__ bool has(const Unit& unit, int row) const {
    return row >= 0 && row >> a_.grid.head_shift < unit.queries;
  }
  __device__ Candidates range(const Unit& unit, int row) const {
    return candidates(a_.grid.selection, unit.seen + (row >> a_.grid.head_shift), unit.kv_len,
                      unit.block0, a_.grid.max_blocks);
  }
  __device__ uint4& pairs(int i) { return list_[i * 128 * Shape::kWarpgroups]; }

  __device__ void insert(uint32_t order, int block) {
    auto id = static_cast<uint32_t>(block);
    bool moved = false;  // once it has found its place, all behind it move down
    const auto pass = [&](uint32_t& slot_order, uint32_t& slot_id) {
      moved = moved || order > slot_order;
      const uint32_t next_order = moved ? slot_order : order, next_id = moved ? slot_id : id;
      if (moved) slot_order = order, slot_id = id;
      order = next_order;
      id = next_id;
    };
#pragma unroll
    for (int i = 0; i < kList / 2; ++i) {
      uint4 pair = pairs(i);
      pass(pair.x, pair.y);
      pass(pair.z, pair.w);
      pairs(i) = pair;
      lowest_ = pair.z;
    }
  }

  __device__ void store(const Unit& unit, int row, int place, const Entry& entry) {
    const Output& out = a_.out;
    const int64_t head = row & ((1 << a_.grid.head_shift) - 1);
    const int64_t token = unit.token + (row >> a_.grid.head_shift);
    if (out.lists != nullptr) {
      const int64_t list = (int64_t{unit.tile} * Shape::kRows + row) * a_.grid.splits + unit.split;
      out.lists[list * kList + place] = entry;
    } else if (place < a_.grid.selection.topk) {
      out.ids.data[out.ids.offset(token, head) + place] = entry.id;
      if (out.scores.data != nullptr)
        out.scores.data[out.scores.offset(token, head) + place] = score_of(entry.order);
    }
  }

  uint4* list_;
  const ScoreArguments& a_;
  Candidates range_;
  uint32_t lowest_;  ///< order of the list's last entry: others must be better
};

}  // namespace msa::cuda::sm90::index
