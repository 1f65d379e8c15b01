// The skeleton of docs/adding-a-kernel.md is a backend that passes the conformance suite.
#include "skeleton_backend/skeleton.h"

#include <gtest/gtest.h>

#include "conformance/harness.h"

namespace msa::conformance {
namespace {

TEST(Skeleton, PassesTheCasesItSupports) {
  const Backend* const backend = skeleton_backend();
  Harness harness(2);
  int passed = 0;
  for (const Case& c : make_cases(Suite::kFull)) {
    if (c.problem.op != Op::kMerge) continue;
    const Result result = harness.run(c, {&backend, 1}).front();
    EXPECT_NE(result.outcome, Outcome::kFailed) << c.name << ": " << result.detail;
    if (result.outcome == Outcome::kPassed) ++passed;
  }
  EXPECT_GE(passed, 10);
}

TEST(Skeleton, RefusesTheRestByName) {
  const Status status = skeleton_backend()->supports({.op = Op::kBlockMass});
  EXPECT_EQ(status.code(), StatusCode::kUnsupported);
  EXPECT_EQ(status.message(), "op: got block_mass, supported: merge");
}

}  // namespace
}  // namespace msa::conformance
