// What a program of dev/emulate.sh tries: the kernels of one family of src/cuda as a backend on
// host memory, and cases for them. Each family is a file of this folder and a program of its own.
#pragma once

#include <span>
#include <string>
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

/// The case with the first seed from `seed` on that the best kernel takes; the strides and dtypes
/// of some are not its own.
inline msa::conformance::Case fitting(msa::conformance::Case c, const msa::Backend& backend,
                                      uint64_t seed = 1) {
  constexpr uint64_t kTries = 100;
  std::string reasons;
  for (c.seed = seed; c.seed < seed + kTries; ++c.seed) {
    const msa::conformance::Instance instance(c, 16);
    const msa::Plan plan = msa::conformance::plan_on(backend, c.problem, instance.limits());
    const msa::Kernel* kernel =
        std::visit([&](const auto& a) { return msa::kernel_of(plan, a); }, instance.params());
    if (kernel != nullptr && kernel == plan.kernels[0]) return c;
  }
  fail(msa::text("a case that these kernels never take: ", c.name, ": ", reasons).c_str());
}

}  // namespace emulator
