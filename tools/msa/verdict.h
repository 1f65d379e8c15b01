// Judging results by the reference, as `msa check` does.
#pragma once

#include "conformance/judge.h"
#include "msa/msa.h"

namespace msa::cli {

using conformance::Verdict;

/// Adds to `verdict` what the fp64 reference says about the outputs in `params`, which `backend`
/// computed from the same arguments. threads may be null.
Status add_verdict(const Problem& problem, const Limits& limits, const Backend& backend,
                   const conformance::Params& params, Threads* threads, Verdict* verdict);

/// Keeps the first failure and the largest error.
void merge(const Verdict& other, Verdict* verdict);

}  // namespace msa::cli
