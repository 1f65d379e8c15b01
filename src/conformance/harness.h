// Runs a case on a backend: right, repeatable, independent of the number of threads, and within
// the memory it was given. What a CUDA backend works on are copies in device memory, the zones
// around outputs and workspace included; they are brought back and judged like those of a CPU one.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "conformance/cases.h"
#include "conformance/instance.h"
#include "conformance/judge.h"
#include "msa/msa.h"

namespace msa::conformance {

enum class Outcome { kPassed, kFailed, kSkipped };

struct Result {
  const Backend* backend = nullptr;
  Outcome outcome = Outcome::kPassed;
  std::string detail;    ///< why it failed, or what the backend does not support
  double max_error = 0;  ///< of the outputs, relative to the largest element of a row
  double seconds = 0;    ///< all repeats and comparisons
};

class Harness {
 public:
  /// `threads` workers for the parallel runs, at least 2.
  explicit Harness(int threads);

  /// One result per backend, in their order.
  std::vector<Result> run(const Case& c, std::span<const Backend* const> backends);

 private:
  Result run(Instance& instance, const Expected& expected, const Backend& backend);
  std::string repeat(Instance& instance, const Expected& expected, const Backend& backend,
                     Verdict* verdict);
  std::string refuse_repeated(Instance& instance, const Backend& backend);
  std::string two_steps(Instance& instance, const Backend& backend);

  Threads threads_;
  std::vector<double> scratch_;
};

}  // namespace msa::conformance
