// Tuned prefill: sparse_attention in bf16 with D 128, Bk 128, K <= 16 and G 8 or 16.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/sm90/prefill/choose.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::prefill {

bool fits(const Problem& problem);

/// False for what only the plain kernels take: a negative scale, rows that are not 16-byte aligned.
bool fits(const SparseAttentionParams& params);

/// Scratch bytes for any call within limits. In KV-outer order about 1.1 GiB from 4,096 tokens of
/// MiniMax-M3's shape on, 270 KB a token below; never 2 GiB.
int64_t workspace_bytes(const Problem& problem, const Limits& limits, Order order);

/// Arguments passed check(), and fits(); `order` is the one the workspace was sized for. Enqueued
/// on `stream`; never allocates, never waits.
Status run(const Plan&, const SparseAttentionParams&, Workspace, Order order, cudaStream_t stream);

}  // namespace msa::cuda::sm90::prefill
