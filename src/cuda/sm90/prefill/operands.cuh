// What every prefill kernel reads and writes beside the tiles of q, k and v: block lists, outputs,
// and the tensors themselves for single rows.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/block_list.cuh"
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

/// Keys or values: [S,Hkv,D] packed, [P,Hkv,Bk,D] paged. Strides in elements.
struct KeyRows {
  const __nv_bfloat16* data;
  int64_t source, head, token;  ///< of a row (packed) or a page; of a token in its block

  /// Row 0 of given block j, which must be there.
  __device__ const __nv_bfloat16* block(const DeviceBatch& batch, const DeviceSequence& s, int j,
                                        int kv_head) const {
    const int64_t at = s.pages != nullptr ? batch.page(s, j) : s.k_begin + j * kBlock;
    return data + at * source + kv_head * head;
  }
};

struct Operands {
  const __nv_bfloat16* q;  ///< [T,Hq,D]
  int64_t q_token, q_head;
  KeyRows k, v;
};

/// Where results go: o [T,Hq,D] as bf16 or f32, lse [T,Hq] or null. Strides in elements.
struct Output {
  void* o;
  float* lse;
  int64_t o_token, o_head, lse_token, lse_head;
};

}  // namespace msa::cuda::sm90::prefill
