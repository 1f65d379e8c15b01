// What a program of dev/emulate.sh tries: the kernels of one family of src/cuda as a backend on
// host memory, and cases for them. Each family is a file of this folder and a program of its own.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "conformance/cases.h"
#include "conformance/instance.h"
#include "core/partial_backend.h"
#include "core/text.h"
#include "cta.h"

namespace emulator {

/// A family's kernels, on host memory. The names are the real backends', by which the judge knows
/// how they round.
class EmulatedBackend : public msa::PartialBackend {
 public:
  explicit EmulatedBackend(const char* name) : name_(name) {}

  const char* name() const override { return name_; }
  const char* requirement() const override { return "x86-64"; }
  int priority() const override { return 0; }
  msa::DeviceKind device() const override { return msa::DeviceKind::kCPU; }
  msa::Status usable() const override { return {}; }
  msa::Status supports(const msa::Problem& problem) const override {
    if (fits(problem)) return {};
    return msa::error(msa::StatusCode::kUnsupported, "not a problem of these kernels");
  }
  virtual bool fits(const msa::Problem& problem) const = 0;
  /// False for arguments of a legal problem that these kernels leave to others.
  virtual bool fits(const msa::conformance::Params& params, const msa::Plan& plan) const = 0;

 private:
  const char* name_;
};

struct EmulatedCase {
  msa::conformance::Case c;
  bool bad_metadata = false;  ///< then once more with lengths, pages and ids that are absurd
};

struct Family {
  std::vector<std::unique_ptr<EmulatedBackend>> backends;
  std::vector<EmulatedCase> cases;
};

/// Of this program.
Family make_family();

/// A family of one backend.
template <class OnlyBackend, class MakeCases>
Family family_of(const MakeCases& make_cases) {
  Family family;
  family.backends.push_back(std::make_unique<OnlyBackend>());
  family.cases = make_cases(*family.backends[0]);
  return family;
}

/// Around the sizes of tiles, with sequences without queries and without keys.
inline const std::vector<msa::conformance::SequenceSize> kRagged = {{1, 1},   {60, 60}, {0, 17},
                                                                    {17, 17}, {5, 0},   {33, 140}};

/// The case with the first seed from `seed` on whose arguments the kernels take; the strides and
/// dtypes of some are not theirs.
inline msa::conformance::Case fitting(msa::conformance::Case c, const EmulatedBackend& backend,
                                      uint64_t seed = 1) {
  constexpr uint64_t kTries = 1000;
  for (c.seed = seed; c.seed < seed + kTries; ++c.seed) {
    const msa::conformance::Instance instance(c, 16);
    const msa::Plan plan{.problem = c.problem, .limits = instance.limits()};
    if (backend.fits(instance.params(), plan)) return c;
  }
  fail(msa::text("a case that these kernels never take: ", c.name).c_str());
}

}  // namespace emulator
