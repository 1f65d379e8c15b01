// Tuned prefill: sparse_attention in bf16 with D 128, Bk 128, K <= 16 and G 8 or 16.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::prefill {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: a negative scale, rows that are not 16-byte aligned.
bool fits(const SparseAttentionParams& params);

/// Scratch bytes for any call within limits.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Arguments passed check(), and fits(). Enqueued on `stream`; never allocates, never waits.
Status run(const Plan&, const SparseAttentionParams&, Workspace, cudaStream_t stream);

}  // namespace msa::cuda::sm90::prefill
