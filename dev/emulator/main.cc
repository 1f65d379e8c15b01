// The prefill kernels in every order, in the emulator (cta.h), through the harness of the
// conformance suite: against the fp64 reference, three times with the same bits, on poisoned
// outputs and in guarded workspaces. Then with metadata that nobody could check, where they may
// give any result but write nowhere else.
#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "conformance/cases.h"
#include "conformance/harness.h"
#include "conformance/instance.h"
#include "core/partial_backend.h"
#include "core/text.h"
#include "cta.h"
#include "cuda/sm90/prefill/launch.h"
#include "cuda/sm90/prefill/windows.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace prefill = msa::cuda::sm90::prefill;

/// Sparse attention in one order, on host memory. The names are the real backends', by which the
/// judge knows how they round: "cuda" is auto.
class EmulatedBackend final : public PartialBackend {
 public:
  EmulatedBackend(const char* name, prefill::Order order) : name_(name), order_(order) {}

  const char* name() const override { return name_; }
  const char* requirement() const override { return "x86-64"; }
  int priority() const override { return 0; }
  DeviceKind device() const override { return DeviceKind::kCPU; }
  Status usable() const override { return {}; }
  Status supports(const Problem& problem) const override {
    if (prefill::fits(problem)) return {};
    return error(StatusCode::kUnsupported, "not a problem of the prefill kernels");
  }
  int64_t workspace_bytes(const Problem& problem, const Limits& limits) const override {
    return prefill::workspace_bytes(problem, limits, order_);
  }
  Status run(const Plan& plan, const SparseAttentionParams& a, Workspace workspace,
             Queue) const override {
    return prefill::run(plan, a, workspace, order_, nullptr);
  }
  using PartialBackend::run;

 private:
  const char* name_;
  prefill::Order order_;
};

/// Sizes around those of tiles, tasks, windows and blocks, and every feature of a batch. Small, as
/// all of them together shall take a minute.
std::vector<Case> make_cases() {
  std::vector<Case> cases;
  const auto add = [&](const char* name, int group, int topk, std::vector<SequenceSize> sequences,
                       auto&& change) {
    Case c;
    c.name = name;
    c.problem = {.dtype = DType::kBF16, .heads_kv = 1, .topk = topk};
    c.optional = true;
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    // A negative scale, which some seeds draw, is not for these kernels.
    for (c.seed = 1; !prefill::fits(std::get<SparseAttentionParams>(Instance(c, 16).params()));)
      ++c.seed;
    cases.push_back(std::move(c));
  };
  const auto paged = [](Case& c) { c.problem.layout = KvLayout::kPaged; };
  add("one tile", 16, 16, {{8, 8}}, [](Case&) {});
  add("one block", 16, 16, {{128, 128}}, [](Case&) {});
  add("ragged", 16, 16, {{1, 1}, {60, 60}, {0, 17}, {17, 17}, {5, 0}, {33, 140}}, [](Case&) {});
  add("long lists", 16, 16, {{21, 2500}}, paged);
  add("G 8, two heads, paged", 8, 16, {{20, 900}, {3, 257}, {27, 1300}}, [](Case& c) {
    c.problem.layout = KvLayout::kPaged;
    c.problem.heads_kv = 2;
  });
  add("G 8, K 1", 8, 1, {{200, 500}}, [](Case&) {});
  add("K 5, two heads, f32", 16, 5, {{33, 400}, {20, 777}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 21;
  });
  add("not causal", 16, 8, {{23, 400}, {10, 1100}}, [](Case& c) { c.causal = false; });
  add("shard", 16, 8, {{30, 800, 700, 3}, {9, 500, 300, 1}}, [](Case& c) {
    c.problem.layout = KvLayout::kPaged;
    c.q_offsets = c.block_offsets = true;
  });
  add("more queries than keys", 16, 16, {{70, 40}}, [](Case&) {});
  add("strided, one list for all heads", 8, 8, {{40, 1000}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.strided = c.shared_ids = c.loose_limits = true;
  });
  add("many sequences", 16, 4, std::vector<SequenceSize>(35, {3, 300}), [](Case&) {});
  return cases;
}

/// Runs the case with absurd lengths, pages and ids; returns what is wrong.
std::string run_bad_metadata(const Case& c, const EmulatedBackend& backend, uint64_t seed) {
  Instance instance(c, 16);
  auto& a = std::get<SparseAttentionParams>(instance.params());
  Rng rng(seed);
  for (const TensorView& view :
       {a.ids, a.batch.cu_seqlens_q, a.batch.cu_seqlens_k, a.batch.seq_lens, a.batch.page_table}) {
    for (int64_t i = 0; view.given() && i < view.numel(); ++i) {
      int32_t& value = view.at<int32_t>()[element_offset(view, i)];
      if (rng.chance(33)) value = rng.pick({-1, -77, 1 << 30, 0x7fffffff, INT32_MIN, 3, 1000000});
    }
  }
  const Plan plan{&backend, instance.problem(), instance.limits(),
                  backend.workspace_bytes(instance.problem(), instance.limits())};
  constexpr size_t kGuard = 4096;
  constexpr std::byte kPoison{0x5a};
  const auto bytes = static_cast<size_t>(plan.workspace_bytes);
  std::vector<double> memory;
  std::byte* const workspace = make_workspace(bytes + kGuard, &memory);
  std::fill_n(workspace, bytes + kGuard, kPoison);
  instance.poison_outputs(kPoison);
  // Not msa::run, which would refuse them: on a device nobody sees them.
  const Status status = backend.run(plan, a, {workspace, bytes}, {});
  if (!status.ok()) return status.message();
  if (std::any_of(workspace + bytes, workspace + bytes + kGuard,
                  [](std::byte b) { return b != kPoison; }))
    return "writes behind its workspace";
  bool untouched = false;
  instance.take_outputs(&untouched);
  return untouched ? "" : "writes outside its outputs";
}

int run_all() {
  const std::array backends{EmulatedBackend("cuda-union", prefill::Order::kUnion),
                            EmulatedBackend("cuda-kv-outer", prefill::Order::kKvOuter),
                            EmulatedBackend("cuda", prefill::Order::kAuto)};
  int passed = 0, failed = 0;
  const auto report = [&](const EmulatedBackend& backend, const std::string& name,
                          const std::string& failure) {
    ++(failure.empty() ? passed : failed);
    std::printf("%-6s %-13s %s%s%s\n", failure.empty() ? "ok" : "FAILED", backend.name(),
                name.c_str(), failure.empty() ? "" : ": ", failure.c_str());
    std::fflush(stdout);
  };
  Harness harness(2);
  for (const Case& c : make_cases()) {
    for (const EmulatedBackend& backend : backends) {
      const Backend* one = &backend;
      const Result result = harness.run(c, {&one, 1})[0];
      report(backend, c.name, result.outcome == Outcome::kPassed ? "" : result.detail);
    }
    if (c.name != "one block" && c.name != "G 8, two heads, paged") continue;
    for (const EmulatedBackend& backend : backends)
      for (uint64_t seed = 1; seed <= 3; ++seed)
        report(backend, text(c.name, ", bad metadata ", seed), run_bad_metadata(c, backend, seed));
  }
  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace emulator

int main() { return emulator::run_all(); }
