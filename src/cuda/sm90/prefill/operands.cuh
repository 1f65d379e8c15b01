// What the prefill kernels read and write beside the tiles of q, k and v: outputs, and the tensors
// themselves for single rows.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/sm90/walk/lists.cuh"

namespace msa::cuda::sm90::prefill {

using walk::chosen_block, walk::Lists;

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
  Rows<const __nv_bfloat16> q;  ///< [T,Hq,D]
  KeyRows k, v;
};

/// Where results go.
struct Output {
  Rows<void> o;     ///< [T,Hq,D], bf16 or f32
  Rows<float> lse;  ///< [T,Hq]
};

}  // namespace msa::cuda::sm90::prefill
