// The backends of this build. A new backend adds its accessor here and its line in registry.cc.
#pragma once

#include "msa/backend.h"

namespace msa {

const Backend* reference_backend();      ///< fp32
const Backend* reference_f64_backend();  ///< the same text in fp64
const Backend* avx2_backend();
const Backend* avx512_backend();
const Backend* amx_backend();
const Backend* cuda_backend();        ///< with the tuned kernels
const Backend* cuda_plain_backend();  ///< any GPU
const Backend* cuda_union_backend();  ///< cuda with sparse prefill in one order
const Backend* cuda_kv_outer_backend();

/// Those of `backend` that compute the problem, best first, null behind the last. Where none fits,
/// why the last one does not. Calls no code of an instruction set.
using Kernels = decltype(Plan::kernels);
Refusal find_kernels(const Backend& backend, const Problem& problem, const Limits& limits,
                     Kernels* out);

/// The problem of one of a kernel's steps.
Problem step_problem(Problem problem, Op step);

/// A plan on this backend; the workspace is what the hungriest of its kernels needs. Where no
/// kernel fits, why the last one does not.
Refusal bind(const Backend& backend, const Problem& problem, const Limits& limits, Plan* out);

/// msa::run for arguments that passed check().
Status run_checked(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue);

/// f.operator()<Params>(op) for every operator.
template <class F>
void for_each_op(const F& f) {
  const auto ops_of = [&]<class Params>() {
    for (Op op : Params::kOps) f.template operator()<Params>(op);
  };
  [&]<class... Params>(ParamsList<Params...>) {
    (ops_of.template operator()<Params>(), ...);
  }(AllParams{});
}

/// A kernel's run() by a function of one type of arguments.
template <class Params, Status (*Run)(const Plan&, const Params&, Workspace, Queue)>
Status run_typed(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  return Run(plan, params.as<Params>(), workspace, queue);
}

}  // namespace msa
