// Dense attention on Hopper: bf16, D 128, Bk 128, any G up to 64.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::dense {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: a negative scale, rows that are not 16-byte aligned.
bool fits(const DenseAttentionParams& params);

/// Scratch bytes for any call within limits.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Arguments passed check() and fits(). Enqueued on `stream`; never allocates, never waits.
Status run(const Plan& plan, const DenseAttentionParams& params, Workspace workspace,
           cudaStream_t stream);

}  // namespace msa::cuda::sm90::dense
