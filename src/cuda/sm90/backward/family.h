// Tuned attention backward, sparse and dense: bf16 with D 128, Bk 128, K <= 16 and G 8 or 16.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::backward {

Refusal fits(const Problem& problem, const Limits& limits);
/// Left to the plain kernels: d_o in f32, rows that are not 16-byte aligned, no query or no key,
/// batches of short sequences with more keys than max_tokens and max_seqlen_k (Limits does not
/// bound their sum), and, unless Bk is 128, shards, which are counted in blocks.
Refusal takes(const Plan& plan, const AttentionBackwardParams& params);

/// About 0.8 GB for 128K tokens of MiniMax-M3's shape.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

Status run(const Plan&, const AttentionBackwardParams&, Workspace, Stream stream);

std::span<const Kernel> kernels();

}  // namespace msa::cuda::sm90::backward
