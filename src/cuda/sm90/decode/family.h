// Decoding steps on Hopper: few new tokens per sequence over a paged cache, bf16, D = Di = 128,
// Bk 128.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::decode {

/// sparse_attention with up to kDecodeTokens new tokens, G <= 16 and K <= 32.
Refusal fits(const Problem& problem, const Limits& limits);
/// index_select with K <= 16, up to 16 rows (new tokens x Hi) per sequence, B <= 1024 and 2^20
/// tokens.
Refusal fits_index(const Problem& problem, const Limits& limits);
/// A whole step: both.
Refusal fits_layer(const Problem& problem, const Limits& limits);
// Left to others: a negative scale, rows that are not 16-byte aligned.
Refusal takes(const Plan& plan, const SparseAttentionParams& params);
Refusal takes(const Plan& plan, const IndexSelectParams& params);
Refusal takes(const Plan& plan, const LayerParams& params);

/// Of index_select and layer: the scores of all blocks. sparse_attention needs none.
int64_t workspace_bytes(const Problem& problem, const Limits& limits);

/// Two launches: block scores, then the choice.
Status run(const Plan& plan, const IndexSelectParams& params, Workspace workspace, Stream stream);
/// One launch.
Status run(const Plan& plan, const SparseAttentionParams& params, Workspace workspace,
           Stream stream);
/// Two launches: block scores, then one that chooses and attends. Same ids and values as
/// index_select and sparse_attention; the workspace is that of the two (core/layer.h).
Status run(const Plan& plan, const LayerParams& params, Workspace workspace, Stream stream);

std::span<const Kernel> kernels();

}  // namespace msa::cuda::sm90::decode
