// Dense attention on Hopper: bf16, D 128, any G up to 64; Bk 128, or packed keys.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::dense {

Refusal fits(const Problem& problem, const Limits& limits);
/// Left to the plain kernels: a negative scale, rows that are not 16-byte aligned, and, unless Bk
/// is 128, maxima of blocks and shards, which are counted in blocks.
Refusal takes(const Plan& plan, const DenseAttentionParams& params);

int64_t workspace_bytes(const Problem& problem, const Limits& limits);
Status run(const Plan& plan, const DenseAttentionParams& params, Workspace workspace,
           Stream stream);

std::span<const Kernel> kernels();

}  // namespace msa::cuda::sm90::dense
