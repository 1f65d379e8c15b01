// The border: every argument is checked here once, by name and shape, before a backend sees it.
#pragma once

#include "msa/backend.h"
#include "msa/ops.h"

namespace msa {

// Each returns ok, or kInvalidArgument with "<argument>: got <given>, expected <legal>".
// One pass over the metadata, no allocation on success.
Status check(const Plan& plan, const IndexScoresParams& params);
Status check(const Plan& plan, const SelectBlocksParams& params);
Status check(const Plan& plan, const IndexSelectParams& params);
Status check(const Plan& plan, const SparseAttentionParams& params);
Status check(const Plan& plan, const DenseAttentionParams& params);
Status check(const Plan& plan, const MergeParams& params);
Status check(const Plan& plan, const BlockListsParams& params);
Status check(const Plan& plan, const AppendPagedParams& params);
Status check(const Plan& plan, const BlockMassParams& params);
Status check(const Plan& plan, const LayerDecodeParams& params);
Status check(const Plan& plan, const AttentionBackwardParams& params);
Status check(const Plan& plan, const IndexLseParams& params);
Status check(const Plan& plan, const KlParams& params);

}  // namespace msa
