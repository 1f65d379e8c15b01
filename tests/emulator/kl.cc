// The index branch in training: index_lse, kl_backward and kl_loss.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/kl/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace kl = msa::cuda::sm90::kl;

/// The support of a call: all blocks, or lists that the caller turned round or not.
enum class Support { kFull, kListed, kTurned };

Support support_of(const Params& params) {
  if (const auto* a = std::get_if<IndexLseParams>(&params))
    return a->block_ids.given() ? Support::kListed : Support::kFull;
  const auto& a = std::get<KlParams>(params);
  return !a.block_ids.given() ? Support::kFull
         : a.row_ptr.given()  ? Support::kTurned
                              : Support::kListed;
}

/// Sizes around those of tiles, steps, tasks, blocks and rounds, and every feature of a batch.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const std::string& name, Op op, Support support, int group, int topk,
                       const std::vector<SequenceSize>& sequences, auto&& change,
                       bool bad_metadata = false) {
    Case c;
    c.name = std::string(name_of(op)) + ": " + name;
    c.problem = {.op = op, .dtype = DType::kBF16, .heads_kv = 1, .topk = topk};
    c.optional = true;
    c.sequences = sequences;
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    cases.push_back(
        {fitting(c, backend, [&](const Params& params) { return support_of(params) == support; }),
         bad_metadata});
  };
  const auto nothing = [](Case&) {};
  const auto two_heads = [](Case& c) { c.problem.heads_kv = 2; };
  const std::vector<SequenceSize> rounds = {{20, 2500}, {5, 5}};

  add("one query", Op::kKlBackward, Support::kListed, 16, 16, {{1, 1}}, nothing);
  add("one block", Op::kKlBackward, Support::kListed, 16, 16, {{128, 128}}, nothing, true);
  add("ragged", Op::kKlBackward, Support::kTurned, 16, 4, kRagged,
      [](Case& c) { c.padded_rows = 3; });
  add("G 8, two heads", Op::kKlBackward, Support::kTurned, 8, 16, {{130, 130}, {3, 3}, {70, 90}},
      two_heads, true);
  add("G 8, K 1, no kl", Op::kKlBackward, Support::kListed, 8, 1, {{150, 500}},
      [](Case& c) { c.optional = false; });
  add("K 5, two heads, f32", Op::kKlBackward, Support::kListed, 16, 5, {{33, 400}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 21;
  });
  add("not causal", Op::kKlBackward, Support::kTurned, 16, 8, {{23, 600}},
      [](Case& c) { c.causal = false; });
  add("shard", Op::kKlBackward, Support::kListed, 16, 8, {{30, 700, 700, 3}},
      [](Case& c) { c.q_offsets = c.block_offsets = true; });
  add("more queries than keys", Op::kKlBackward, Support::kListed, 8, 16, {{170, 40}}, nothing);
  add("strided, one list for all heads", Op::kKlBackward, Support::kListed, 8, 8, {{40, 1000}},
      [](Case& c) {
        c.problem.heads_kv = 2;
        c.strided = c.shared_ids = c.loose_limits = true;
      });
  add("full", Op::kKlBackward, Support::kFull, 16, 16, {{150, 300}}, nothing, true);
  add("full, kRagged, f32", Op::kKlBackward, Support::kFull, 8, 2, kRagged, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 5;
  });
  add("full, rounds", Op::kKlBackward, Support::kFull, 8, 4, rounds, nothing, true);
  add("full, blocks of 32", Op::kKlBackward, Support::kFull, 16, 40, rounds,
      [](Case& c) { c.problem.block_size = 32; });
  add("full, rounds, not causal, strided", Op::kKlBackward, Support::kFull, 8, 4, {{6, 2300}},
      [](Case& c) {
        c.causal = false;
        c.strided = c.loose_limits = true;
      });
  for (const auto& [name, values] : kEveryValues)
    add(name, Op::kKlBackward, Support::kListed, 16, 2, {{40, 300}},
        [values](Case& c) { c.values = values; });

  add("ragged", Op::kKlLoss, Support::kListed, 16, 4, kRagged, two_heads, true);
  add("G 8, K 16", Op::kKlLoss, Support::kListed, 8, 16, {{100, 700}}, nothing);
  add("full, rounds", Op::kKlLoss, Support::kFull, 8, 4, rounds, nothing);

  add("ragged", Op::kIndexLse, Support::kListed, 16, 4, kRagged, two_heads, true);
  add("K 16, strided", Op::kIndexLse, Support::kListed, 16, 16, {{100, 2500}, {3, 3}}, [](Case& c) {
    c.problem.heads_kv = 3;
    c.strided = c.loose_limits = true;
    c.padded_rows = 2;
  });
  add("giant", Op::kIndexLse, Support::kListed, 16, 4, {{40, 300}},
      [](Case& c) { c.values = Values::kGiant; });
  add("shard", Op::kIndexLse, Support::kListed, 16, 8, {{30, 700, 700, 3}},
      [](Case& c) { c.q_offsets = c.block_offsets = c.shared_ids = true; });
  add("full, ragged", Op::kIndexLse, Support::kFull, 16, 4, kRagged, two_heads, true);
  add("full, blocks of 32", Op::kIndexLse, Support::kFull, 16, 40, kRagged,
      [](Case& c) { c.problem.block_size = 32; });
  add("full, rounds", Op::kIndexLse, Support::kFull, 16, 4, {{20, 4500}, {5, 100}}, two_heads);
  return cases;
}

}  // namespace

Family make_family() { return family_of(kl::kernels(), make_cases); }

}  // namespace emulator
