// Tuned prefill: sparse_attention in bf16 with D 128, Bk 128, K <= 16 and G 8 or 16.
#pragma once

#include "cuda/sm90/prefill/order.h"
#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::prefill {

Refusal fits(const Problem& problem, const Limits& limits);
/// Left to the plain kernels: a negative scale, rows that are not 16-byte aligned.
Refusal takes(const Plan& plan, const SparseAttentionParams& params);

/// In KV-outer order about 1.1 GiB from 4,096 tokens of MiniMax-M3's shape on, 270 KB a token
/// below; never 2 GiB.
int64_t workspace_bytes(const Problem& problem, const Limits& limits, Order order);

/// `order` is the one the workspace was sized for.
Status run(const Plan&, const SparseAttentionParams&, Workspace, Order order, Stream stream);

/// Lives as long as the program.
const Kernel& kernel(Order order);

}  // namespace msa::cuda::sm90::prefill
