// What every prefill kernel reads and writes beside q, k and v: block lists and outputs.
#pragma once

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/prefill/config.h"

namespace msa::cuda::sm90::prefill {

/// The lists of queries: i32 [Hkv,T,K], any strides.
struct Lists {
  const int32_t* ids;
  int64_t head_stride, token_stride;
  int32_t topk;

  __device__ int id(int head, int64_t token, int slot) const {
    return ids[head * head_stride + token * token_stride + slot];
  }
};

/// The block in slot lane % 16 of the list of query row `row` (-1: no such row), which sees
/// `visible` keys of sequence s. Counted from the first given block; -1 where the slot is behind
/// the list's end or names a block that the query cannot see or nobody can read. All lanes of a
/// warp together; 16 neighbouring ones ask for the same row.
__device__ inline int chosen_block(const DeviceBatch& batch, const Lists& lists,
                                   const DeviceSequence& s, int head, int row, int visible) {
  const int lane = threadIdx.x % 32, slot = lane % kMostSlots;
  const int id = row >= 0 && slot < lists.topk ? lists.id(head, row, slot) : -1;
  // The first -1 ends a list, which lies in 16 neighbouring lanes.
  const uint32_t ends = __ballot_sync(0xffffffff, id < 0) >> (lane - slot);
  const bool listed = (ends & ((2u << slot) - 1)) == 0;
  const int block = listed ? id - s.block0 : -1;
  const bool seen = block >= 0 && block < (visible >> 7) + ((visible & 127) != 0);
  return seen && (s.pages == nullptr || batch.page(s, block) >= 0) ? block : -1;
}

/// Where results go: o [T,Hq,D] as bf16 or f32, lse [T,Hq] or null. Strides in elements.
struct Output {
  void* o;
  float* lse;
  int64_t o_token, o_head, lse_token, lse_head;
};

}  // namespace msa::cuda::sm90::prefill
