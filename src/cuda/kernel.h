// Kernels of CUDA as values (msa/backend.h), from functions of one type of arguments.
#pragma once

#include <cstdint>
#include <span>

#include "cuda/device.h"
#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda {

template <class Params>
using LaunchFn = Status (*)(const Plan&, const Params&, Workspace, Stream);

/// Kernel::run by a launch function, with the problem's device as the current one.
template <class Params, LaunchFn<Params> kLaunch>
Status run_on_device(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  const DeviceScope scope(plan.problem.device.id);
  MSA_TRY(scope.status());
  return kLaunch(plan, params.as<Params>(), workspace, static_cast<Stream>(queue.cuda_stream));
}

/// Kernel::fits of a tuned family: its own, on a Hopper.
template <Refusal (*kFits)(const Problem&, const Limits&)>
Refusal fits_on_hopper(const Problem& problem, const Limits& limits) {
  const DeviceInfo* device = nullptr;
  if (!device_info(problem.device.id, &device).ok()) return {"device", "none", 0, "sm_90"};
  if (device->capability != kHopper) return {"device", nullptr, device->capability, "sm_90"};
  return kFits(problem, limits);
}

template <class Params, Refusal (*kTakes)(const Plan&, const Params&)>
Refusal takes_params(const Plan& plan, const ParamsRef& params) {
  return kTakes(plan, params.as<Params>());
}

/// A kernel of a tuned family. Its tensor maps want 16-byte addresses and strides.
template <class Params, Refusal (*kFits)(const Problem&, const Limits&),
          Refusal (*kTakes)(const Plan&, const Params&), LaunchFn<Params> kLaunch>
constexpr Kernel tuned(Op op, const char* name,
                       int64_t (*workspace_bytes)(const Problem&, const Limits&),
                       std::span<const Op> steps = {}) {
  return {.op = op,
          .name = name,
          .fits = fits_on_hopper<kFits>,
          .takes = takes_params<Params, kTakes>,
          .workspace_bytes = workspace_bytes,
          .run = run_on_device<Params, kLaunch>,
          .steps = steps,
          .rounds_probabilities = true,
          .alignment = 16};
}

}  // namespace msa::cuda
