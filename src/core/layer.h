// msa_layer_decode as the two operators that it joins, for backends without a kernel that does.
#pragma once

#include "msa/backend.h"

namespace msa {

/// The two calls of one step. Without the caller's ids they lie in the workspace.
struct LayerSteps {
  Plan select_plan{}, attend_plan{};
  IndexSelectParams select;
  SparseAttentionParams attend;
  Workspace workspace;  ///< for either
};
LayerSteps layer_steps(const Plan& plan, const LayerDecodeParams& params, Workspace workspace);

/// index_select, then sparse_decode, each on the best kernel of the plan's backend.
extern const Kernel kLayerSteps;
/// Empty when `backend` has both operators.
Refusal layer_steps_fit(const Backend& backend, const Problem& problem, const Limits& limits);
/// Bytes of the ids [Hkv,T,K] and, behind them, of what either operator needs.
int64_t layer_steps_bytes(const Backend& backend, const Problem& problem, const Limits& limits);

}  // namespace msa
