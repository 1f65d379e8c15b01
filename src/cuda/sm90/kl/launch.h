// The index branch in training on Hopper: index_lse, kl_loss and kl_backward in bf16 with D, Di and
// Bk 128 and K <= 16; the KL for G 8 and 16.
#pragma once

#include <cuda_runtime_api.h>

#include "msa/backend.h"

namespace msa::cuda::sm90::kl {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: a negative scale, rows that are not 16-byte aligned,
/// more keys than limits let expect (backward/tasks.h), lists of more than 16 blocks or of others
/// than of 128 tokens, and such shards.
bool fits(const IndexLseParams& params, const Plan& plan);
bool fits(const KlParams& params, const Plan& plan);

/// Scratch bytes for any call within limits. kl_backward of MiniMax-M3's shape: 1.3 GB for 32K
/// tokens, 4.9 GB for 128K, of which 8 KB a (query, KV head) are partial results; the others some
/// 130 bytes a (query, KV head).
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Arguments passed check(), and fits(). Enqueued on `stream`; never allocates, never waits.
Status run(const Plan&, const IndexLseParams&, Workspace, cudaStream_t stream);
Status run(const Plan&, const KlParams&, Workspace, cudaStream_t stream);

}  // namespace msa::cuda::sm90::kl
