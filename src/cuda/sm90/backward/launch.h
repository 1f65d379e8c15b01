// Tuned attention backward, sparse and dense: bf16 with D 128, Bk 128, K <= 16 and G 8 or 16.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::backward {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: d_o in f32, rows that are not 16-byte aligned, no
/// query or no key, batches of short sequences with more keys than max_tokens and max_kv_len
/// (Limits does not bound their sum), and, unless Bk is 128, shards, which are counted in blocks.
bool fits(const AttentionBackwardParams& params, const Plan& plan);

/// Scratch bytes for any call within limits: about 0.8 GB for 128K tokens of MiniMax-M3's shape.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Arguments passed check(), and fits(). Enqueued on `stream`; never allocates, never waits.
Status run(const Plan&, const AttentionBackwardParams&, Workspace, cudaStream_t stream);

}  // namespace msa::cuda::sm90::backward
