// The kernels of a family (family.h) in the emulator (cta.h), through the harness of the
// conformance suite: against the fp64 reference, three times with the same bits, on poisoned
// outputs and in guarded workspaces. Then with metadata that nobody could check, where they may
// give any result but write nowhere else.
//
//   emulate_NAME [WORD]   the cases whose name contains WORD, without one all
#include <algorithm>
#include <cstdio>
#include <ctime>
#include <string>
#include <variant>
#include <vector>

#include "conformance/harness.h"
#include "conformance/judge.h"
#include "core/op_table.h"
#include "core/registry.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;

/// Runs the case with absurd lengths, pages and ids; returns what is wrong.
std::string run_bad_metadata(const Case& c, const Backend& backend, uint64_t seed) {
  Instance instance(c, 16);
  Params& params = instance.params();
  Rng rng(seed);
  std::vector<const TensorView*> metadata;
  for (const TensorView* view : arguments(params))
    if (view->given() && view->dtype == DType::kI32) metadata.push_back(view);
  for (const Output& output : outputs(params)) std::erase(metadata, output.view);
  for (const TensorView* view : metadata) {
    for (int64_t i = 0; i < view->numel(); ++i) {
      int32_t& value = view->at<int32_t>()[element_offset(*view, i)];
      if (rng.chance(33)) value = rng.pick({-1, -77, 1 << 30, 0x7fffffff, INT32_MIN, 3, 1000000});
    }
  }
  const Plan plan = plan_on(backend, instance.problem(), instance.limits());
  constexpr size_t kGuard = 4096;
  constexpr std::byte kPoison{0x5a};
  const auto bytes = static_cast<size_t>(plan.workspace_bytes);
  std::vector<double> memory;
  std::byte* const workspace = make_workspace(bytes + kGuard, &memory);
  std::fill_n(workspace, bytes + kGuard, kPoison);
  instance.poison_outputs(kPoison);
  // Not msa::run, which would refuse them: on a device nobody sees them.
  const Status status = std::visit(
      [&](const auto& a) { return run_checked(plan, a, {workspace, bytes}, {}); }, params);
  if (!status.ok()) return status.message();
  if (std::any_of(workspace + bytes, workspace + bytes + kGuard,
                  [](std::byte b) { return b != kPoison; }))
    return "writes behind its workspace";
  bool untouched = false;
  instance.take_outputs(&untouched);
  return untouched ? "" : "writes outside its outputs";
}

/// Lists that name a block twice, which msa::run would refuse: the result is that of the sets.
std::string run_repeated(const Case& c, const Backend& backend) {
  Instance instance(c, 16);
  Expected expected;
  Status status = expect(c.problem, instance.limits(), instance.params(), nullptr, &expected);
  if (!status.ok()) return status.message();
  const bool listed = info_of(c.problem.op).find("block_ids")->role == Role::kInput;
  if (!instance.repeat_ids()) return listed ? "no list names a block twice" : "";
  const Plan plan = plan_on(backend, c.problem, instance.limits());
  std::vector<double> memory;
  const auto bytes = static_cast<size_t>(plan.workspace_bytes);
  std::byte* const workspace = make_workspace(bytes, &memory);
  instance.poison_outputs(std::byte{0xff});
  status = std::visit([&](const auto& a) { return run_checked(plan, a, {workspace, bytes}, {}); },
                      instance.params());
  if (!status.ok()) return status.message();
  return judge(expected, instance.params(), {.rounds_probabilities = rounds_probabilities(plan)})
      .failure;
}

int run_all(const std::string& word) {
  const Family family = make_family();
  int passed = 0, failed = 0;
  std::clock_t last = std::clock();
  const auto report = [&](const Backend& backend, const std::string& name,
                          const std::string& failure) {
    ++(failure.empty() ? passed : failed);
    const std::clock_t now = std::clock();
    std::printf("%-6s %6.2f s  %-13s %s%s%s\n", failure.empty() ? "ok" : "FAILED",
                static_cast<double>(now - last) / CLOCKS_PER_SEC, backend.name, name.c_str(),
                failure.empty() ? "" : ": ", failure.c_str());
    last = now;
    std::fflush(stdout);
  };
  Harness harness(2);
  for (const auto& [c, bad_metadata] : family.cases) {
    if (c.name.find(word) == std::string::npos) continue;
    for (const Backend& backend : family.backends) {
      const Backend* const list[] = {&backend};
      const Result result = harness.run(c, list)[0];
      report(backend, c.name, result.outcome == Outcome::kPassed ? "" : result.detail);
      if (c.repeated_ids) report(backend, text(c.name, ", unchecked"), run_repeated(c, backend));
      for (uint64_t seed = 1; bad_metadata && seed <= 3; ++seed)
        report(backend, text(c.name, ", bad metadata ", seed), run_bad_metadata(c, backend, seed));
    }
  }
  std::printf("%d passed, %d failed, %.0f s of processor time\n", passed, failed,
              static_cast<double>(std::clock()) / CLOCKS_PER_SEC);
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace emulator

int main(int count, char** words) { return emulator::run_all(count > 1 ? words[1] : ""); }
