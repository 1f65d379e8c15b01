// The index branch in training on Hopper: index_lse, kl_loss and kl_backward in bf16 with D, Di and
// Bk 128 and K <= 16; the KL for G 8 and 16.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::kl {

Refusal fits(const Problem& problem, const Limits& limits);
// Left to the plain kernels: a negative scale, rows that are not 16-byte aligned, more keys than
// limits let expect (walk/tasks.h), lists of more than 16 blocks or of others than of 128
// tokens, and such shards.
Refusal takes(const Plan& plan, const IndexLseParams& params);
Refusal takes(const Plan& plan, const KlParams& params);

/// Whether calls with lists of blocks are taken: K <= 16 blocks of 128.
bool fits_lists(const Problem& problem);

/// kl_backward of MiniMax-M3's shape: 1.3 GB for 32K tokens, 4.9 GB for 128K, of which 8 KB a
/// (query, KV head) are partial results; the others some 130 bytes a (query, KV head).
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

Status run(const Plan&, const IndexLseParams&, Workspace, Stream stream);
Status run(const Plan&, const KlParams&, Workspace, Stream stream);

std::span<const Kernel> kernels();

}  // namespace msa::cuda::sm90::kl
