// Dense attention on Hopper: bf16, D 128, any G up to 64; Bk 128, or packed keys.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::dense {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: a negative scale, rows that are not 16-byte aligned,
/// and, unless Bk is 128, maxima of blocks and shards, which are counted in blocks.
bool fits(const DenseAttentionParams& params, const Plan& plan);

/// Scratch bytes for any call within limits.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Arguments passed check() and fits(). Enqueued on `stream`; never allocates, never waits.
Status run(const Plan& plan, const DenseAttentionParams& params, Workspace workspace,
           cudaStream_t stream);

}  // namespace msa::cuda::sm90::dense
