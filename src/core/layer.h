// msa_layer as the two operators that it joins.
#pragma once

#include "msa/backend.h"

namespace msa {

/// The two calls. Without the caller's ids they lie in the workspace.
struct LayerSteps {
  Plan select_plan{}, attend_plan{};
  IndexSelectParams select;
  SparseAttentionParams attend;
  Workspace workspace;  ///< for either
};
LayerSteps layer_steps(const Plan& plan, const LayerParams& params, Workspace workspace);

/// Bytes of the ids [Hkv,T,K] in front of what either operator needs.
int64_t layer_ids_bytes(const Problem& problem, const Limits& limits);
inline constexpr Op kLayerOps[] = {Op::kIndexSelect, Op::kSparseAttention};
/// index_select, then sparse_attention, each on the best kernel of the plan's backend.
extern const Kernel kLayerSteps;

}  // namespace msa
