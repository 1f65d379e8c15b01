// Inverse lists: an operator of its own, block_lists, and what the gradients of keys walk.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/smxx/tensor.cuh"

namespace msa::cuda::plain {

/// The CSR of block_lists: the caller's, which nobody checked, or our own.
struct InverseLists {
  Tensor row_ptr;    ///< i32 [Hkv,rows+1], or not given: every query reads every key that it sees
  Tensor entries;    ///< i32 [Hkv,most]: token*K + slot
  int64_t rows = 0;  ///< NB, or more
  int64_t most = 0;  ///< T*K
  int topk = 0;
};

/// *out = `row_ptr` and `entries`, without them what block_lists makes of `ids` [Hkv,T,K], in the
/// workspace; nothing without ids. `keys` = S.
Status inverse_lists(const Plan& plan, const TensorView& ids, const TensorView& row_ptr,
                     const TensorView& entries, const Batch& batch, int64_t keys,
                     Workspace workspace, cudaStream_t stream, InverseLists* out);

/// Its workspace for any call within limits.
int64_t inverse_lists_bytes(const Problem& problem, const Limits& limits);

/// Bytes from one part of a workspace to the next, which CUDA wants at a multiple of 256.
constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace msa::cuda::plain
