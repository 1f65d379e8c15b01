// The index branch on Hopper: index_scores, select_blocks and index_select.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::index {

/// Whether these kernels compute `problem` (one of the three operators).
bool fits(const Problem& problem);
/// Whether they take this call: causal, with strides that TMA can walk.
bool fits(const IndexScoresParams& a);
bool fits(const IndexSelectParams& a);
bool fits(const SelectBlocksParams& a);

/// Scratch bytes for any call within limits.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

// Arguments passed check(), problem and arguments fit. Enqueued on `stream`; never allocate, never
// wait.
Status run(const Plan& plan, const IndexScoresParams& a, Workspace workspace, cudaStream_t stream);
Status run(const Plan& plan, const SelectBlocksParams& a, Workspace workspace, cudaStream_t stream);
Status run(const Plan& plan, const IndexSelectParams& a, Workspace workspace, cudaStream_t stream);

}  // namespace msa::cuda::sm90::index
