// Sparse prefill in every order.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/prefill/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace prefill = msa::cuda::sm90::prefill;

/// Sizes around those of tiles, tasks, windows and blocks, and every feature of a batch. Small, as
/// all of them together shall take a minute.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const char* name, int group, int topk, std::vector<SequenceSize> sequences,
                       auto&& change) {
    Case c;
    c.name = name;
    c.problem = {.dtype = DType::kBF16, .heads_kv = 1, .topk = topk};
    c.optional = true;
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    const bool bad_metadata = c.name == "one block" || c.name == "G 8, two heads, paged";
    cases.push_back({fitting(std::move(c), backend), bad_metadata});
  };
  const auto paged = [](Case& c) { c.problem.layout = KvLayout::kPaged; };
  add("one tile", 16, 16, {{8, 8}}, [](Case&) {});
  add("one block", 16, 16, {{128, 128}}, [](Case&) {});
  add("ragged", 16, 16, kRagged, [](Case&) {});
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
  const auto giant = [](Case& c) { c.values = Values::kGiant; };
  const auto non_finite = [](Case& c) { c.values = Values::kNonFinite; };
  add("giant logits", 16, 4, {{30, 500}, {3, 3}}, giant);
  add("giant logits, G 8", 8, 4, {{24, 500}}, giant);
  const auto repeated = [](Case& c) { c.repeated_ids = true; };
  add("repeated ids", 16, 4, {{40, 900}, {3, 3}}, repeated);
  add("repeated ids, G 8", 8, 16, {{40, 900}}, repeated);
  add("values that are no numbers", 16, 4, {{40, 400}, {9, 9}}, non_finite);
  add("values that are no numbers, G 8, paged, f32", 8, 2, {{20, 300}, {30, 500}}, [&](Case& c) {
    non_finite(c);
    paged(c);
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 2;
  });
  return cases;
}

}  // namespace

Family make_family() {
  Family family;
  for (const auto& [name, order] : {std::pair{"cuda-union", prefill::Order::kUnion},
                                    {"cuda-kv-outer", prefill::Order::kKvOuter},
                                    {"cuda", prefill::Order::kAuto}})
    family.backends.push_back(on_host(name, {&prefill::kernel(order), 1}));
  family.cases = make_cases(family.backends[0]);
  return family;
}

}  // namespace emulator
