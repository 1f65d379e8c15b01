// msa_layer_decode as the two operators that it joins. A backend passes the question on in
// supports() and workspace_bytes(); Backend::run() runs the two unless it is overridden.
#pragma once

#include "msa/backend.h"

namespace msa {

/// Ok when `backend` supports both operators.
Status supports_layer_decode(const Backend& backend, const Problem& problem);

/// Bytes of the ids [Hkv,T,K] and, behind them, of what either operator needs.
int64_t layer_decode_bytes(const Backend& backend, const Problem& problem, const Limits& limits);

/// The two calls of one step. Without the caller's ids they lie in the workspace.
struct LayerDecodeSteps {
  Plan select_plan, attend_plan;
  IndexSelectParams select;
  SparseAttentionParams attend;
  Workspace workspace;  ///< for either
};
LayerDecodeSteps layer_decode_steps(const Plan& plan, const LayerDecodeParams& params,
                                    Workspace workspace);

}  // namespace msa
