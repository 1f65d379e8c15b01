// What a test tries: the kernels of one family of src/cuda as a backend on host memory, and cases
// for them. Each family is a file of this folder and a program of its own.
#pragma once

#include <set>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "conformance/cases.h"
#include "conformance/instance.h"
#include "conformance/judge.h"
#include "core/text.h"
#include "cta.h"

namespace emulator {

/// Kernels of src/cuda as a backend on host memory.
inline msa::Backend on_host(const char* name, std::span<const msa::Kernel> kernels) {
  return {.name = name,
          .requirement = "x86-64",
          .priority = 0,
          .device = msa::DeviceKind::kCPU,
          .usable = [] { return msa::Status(); },
          .kernels = kernels};
}

struct EmulatedCase {
  msa::conformance::Case c;
  bool bad_metadata = false;  ///< then once more with lengths, pages and ids that are absurd
};

struct Family {
  std::vector<msa::Backend> backends;
  std::vector<EmulatedCase> cases;
};

/// Of this program.
Family make_family();

/// A family of one backend.
template <class MakeCases>
Family family_of(std::span<const msa::Kernel> kernels, const MakeCases& make_cases) {
  const msa::Backend backend = on_host("cuda", kernels);
  return {.backends = {backend}, .cases = make_cases(backend)};
}

/// Around the sizes of tiles, with sequences without queries and without keys.
inline const std::vector<msa::conformance::SequenceSize> kRagged = {{1, 1},   {60, 60}, {0, 17},
                                                                    {17, 17}, {5, 0},   {33, 140}};

/// Contents that every backend must bear, each with the name of its case.
inline constexpr std::pair<const char*, msa::conformance::Values> kEveryValues[] = {
    {"ties", msa::conformance::Values::kTies},
    {"equal keys", msa::conformance::Values::kEqual},
    {"zeros", msa::conformance::Values::kZero},
    {"huge", msa::conformance::Values::kHuge},
    {"peaked", msa::conformance::Values::kPeaked},
    {"rising", msa::conformance::Values::kRising},
    {"falling", msa::conformance::Values::kFalling},
    {"giant", msa::conformance::Values::kGiant}};

/// The case with the first seed that the best kernel takes and whose arguments are as `wanted`: the
/// seed chooses strides, dtypes, and what a caller may leave out.
template <class Wanted>
msa::conformance::Case fitting(msa::conformance::Case c, const msa::Backend& backend,
                               const Wanted& wanted) {
  using namespace msa::conformance;
  constexpr uint64_t kTries = 100;
  std::set<std::string> reasons;
  for (c.seed = 1; c.seed <= kTries; ++c.seed) {
    const Instance instance(c, 16, /*results=*/false);
    const msa::Plan plan = plan_on(backend, c.problem, instance.limits());
    std::string refusals = supported_on(backend, c.problem, instance.limits()).message();
    const msa::Kernel* kernel = std::visit(
        [&](const auto& a) { return msa::kernel_of(plan, a, &refusals); }, instance.params());
    const bool taken = kernel != nullptr && kernel == plan.kernels[0];
    if (taken && wanted(instance.params())) return c;
    reasons.insert(taken ? "other arguments than wanted" : refusals);
  }
  std::string what = msa::text(c.name, ": none of ", kTries, " seeds will do:");
  for (const std::string& reason : reasons) what += "\n  " + reason;
  fail(what.c_str());
}
inline msa::conformance::Case fitting(msa::conformance::Case c, const msa::Backend& backend) {
  return fitting(std::move(c), backend, [](const msa::conformance::Params&) { return true; });
}

}  // namespace emulator
