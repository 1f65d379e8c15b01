#include "msa/verdict.h"

#include <algorithm>

namespace msa::cli {

Status add_verdict(const Problem& problem, const Limits& limits, const Backend& backend,
                   const conformance::Params& params, Threads* threads, Verdict* verdict) {
  conformance::Expected expected;
  MSA_TRY(conformance::expect(problem, limits, params, threads, &expected));
  const bool rounds =
      conformance::rounds_probabilities(conformance::plan_on(backend, problem, limits));
  merge(conformance::judge(expected, params, {.rounds_probabilities = rounds}), verdict);
  return {};
}

void merge(const Verdict& other, Verdict* verdict) {
  verdict->max_error = std::max(verdict->max_error, other.max_error);
  if (verdict->ok()) verdict->failure = other.failure;
}

}  // namespace msa::cli
