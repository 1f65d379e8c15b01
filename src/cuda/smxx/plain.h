// Every operator for any legal shape, on any GPU from sm_80 on: readable first. The tuned families
// (sm90/) are compared with these, and fall back to them.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/device.h"
#include "msa/backend.h"

namespace msa::cuda::plain {

/// Ok, or kUnsupported: what does not fit into a grid or into the device's shared memory.
Status supports(const Problem& problem, const DeviceInfo& device);

/// Scratch bytes for any call within limits, 0 for most operators.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

// Arguments passed check(). Enqueued on `stream`; never allocate, never wait.
Status run(const Plan&, const IndexScoresParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const SelectBlocksParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const IndexSelectParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const SparseAttentionParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const DenseAttentionParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const MergeParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const BlockListsParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const AppendPagedParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const BlockMassParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const AttentionBackwardParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const IndexLseParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const KlParams&, Workspace, cudaStream_t stream);

// Parts of the above.
int64_t index_select_bytes(const Problem& problem, const Limits& limits);
int64_t block_lists_bytes(const Problem& problem, const Limits& limits);
int64_t attention_backward_bytes(const Problem& problem, const Limits& limits);
int64_t kl_bytes(const Problem& problem, const Limits& limits);
// Shared memory of one CTA. No forward operator takes more than sparse and dense attention.
uint32_t attention_shared_bytes(const Problem& problem);
uint32_t attention_backward_shared_bytes(const Problem& problem);
uint32_t index_lse_shared_bytes(const Problem& problem);
uint32_t kl_shared_bytes(const Problem& problem);

}  // namespace msa::cuda::plain
