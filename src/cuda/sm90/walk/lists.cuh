// Block lists of queries as the kernels read them.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/block_list.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/walk/config.h"

namespace msa::cuda::sm90::walk {

/// The lists of queries: i32 [Hkv,T,K].
struct Lists {
  Rows<const int32_t> ids;
  int32_t topk;

  __device__ int id(int head, int64_t token, int slot) const {
    return ids.data[head * ids.head + token * ids.token + slot];
  }
};

inline Lists lists(const TensorView& ids, int32_t topk) {
  return {rows<const int32_t>(ids, 1), topk};
}

/// The block in slot lane % 16 of the list of query row `row` (-1: no such row), which sees
/// `visible` keys of sequence s. Counted from the first given block; -1 where the slot does not
/// count or names a block that the query cannot see or nobody can read. All lanes of a warp
/// together; 16 neighbouring ones ask for the same row. kRepeats: a block that is named again comes
/// again, for callers that unite the lists.
template <bool kRepeats = false>
__device__ inline int chosen_block(const DeviceBatch& batch, const Lists& lists,
                                   const DeviceSequence& s, int head, int row, int visible) {
  const int slot = threadIdx.x % kMostSlots;
  const int id = row >= 0 && slot < lists.topk ? lists.id(head, row, slot) : -1;
  const bool counted = kRepeats ? is_listed<kMostSlots>(id) : counts<kMostSlots>(id);
  const int block = counted ? id - s.block0 : -1;
  const bool seen = block >= 0 && block < (visible >> 7) + ((visible & 127) != 0);
  return seen && (s.pages == nullptr || batch.page(s, block) >= 0) ? block : -1;
}

}  // namespace msa::cuda::sm90::walk
