// Decode for Hopper: 1..16 new tokens per sequence over a paged cache, bf16, D = Di = 128, Bk 128.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::decode {

/// True for sparse_decode problems with G <= 16 and K <= 32.
bool fits(const Problem& problem);
/// False for a negative scale and for rows that are not 16-byte aligned.
bool fits(const SparseAttentionParams& params);
/// True for index_select problems with K <= 16, up to 16 rows (new tokens x Hi) per sequence,
/// B <= 1024 and 2^20 tokens.
bool fits_index(const Problem& problem, const Limits& limits);
/// False for rows that are not 16-byte aligned.
bool fits(const IndexSelectParams& params);

/// Of index_select and layer: the scores of all blocks. sparse_decode needs none.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

// Arguments passed check(), and they fit. Enqueued on `stream`; never allocate, never wait.

/// Two launches: block scores, then the choice.
Status run(const Plan& plan, const IndexSelectParams& params, Workspace workspace,
           cudaStream_t stream);
/// One launch.
Status run(const Plan& plan, const SparseAttentionParams& params, cudaStream_t stream);
/// index_select and sparse_decode over its ids in two launches: block scores, then one that chooses
/// and attends. Same ids and values as the two calls.
Status run_layer(const Plan& index_plan, const IndexSelectParams& index, const Plan& attention_plan,
                 const SparseAttentionParams& attention, Workspace workspace, cudaStream_t stream);

}  // namespace msa::cuda::sm90::decode
