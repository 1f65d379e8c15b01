// The index branch on Hopper: index_scores, select_blocks and index_select.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::sm90::index {

Refusal fits(const Problem& problem, const Limits& limits);
// Left to the plain kernels: no causal mask, rows that are not 16-byte aligned.
Refusal takes(const Plan& plan, const IndexScoresParams& params);
Refusal takes(const Plan& plan, const IndexSelectParams& params);
Refusal takes(const Plan& plan, const SelectBlocksParams& params);

int64_t workspace_bytes(const Problem& problem, const Limits& limits);

Status run(const Plan& plan, const IndexScoresParams& a, Workspace workspace, Stream stream);
Status run(const Plan& plan, const SelectBlocksParams& a, Workspace workspace, Stream stream);
Status run(const Plan& plan, const IndexSelectParams& a, Workspace workspace, Stream stream);

std::span<const Kernel> kernels();

}  // namespace msa::cuda::sm90::index
