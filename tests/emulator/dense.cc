// Dense attention, prefill and decode.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/dense/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace dense = msa::cuda::sm90::dense;

/// Tiles of one and of two warpgroups, equal shares and whole tiles, and every feature of a batch.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const char* name, int group, std::vector<SequenceSize> sequences,
                       auto&& change, bool bad_metadata = false) {
    Case c;
    c.name = name;
    c.problem = {.op = Op::kDenseAttention, .dtype = DType::kBF16, .heads_kv = 1};
    c.optional = true;
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    cases.push_back({fitting(std::move(c), backend), bad_metadata});
  };
  const auto nothing = [](Case&) {};
  const auto paged = [](Case& c) { c.problem.layout = KvLayout::kPaged; };

  // Few new tokens: equal shares of all blocks, tiles of 64 rows.
  add("one key", 16, {{1, 1}}, nothing);
  add("one token", 16, {{1, 4500}}, paged);
  add(
      "few tokens, ragged", 8, {{1, 129}, {3, 2500}, {0, 77}, {4, 2}, {1, 0}, {8, 700}},
      [&](Case& c) {
        paged(c);
        c.problem.heads_kv = 2;
        c.padded_rows = 3;
      },
      true);
  add("many sequences", 16, std::vector<SequenceSize>(70, {1, 130}), paged);
  // More tokens, tiles of 128 rows.
  add("one block", 8, {{128, 128}}, nothing, true);
  add("blocks of 32", 16, kRagged, [](Case& c) {
    c.problem.block_size = 32;
    c.optional = false;  // no maxima of blocks
  });
  add("G 64, packed", 64, {{5, 1000}, {2, 70}}, nothing);
  add("ragged, G 5, f32", 5, kRagged, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 21;
  });
  add("more queries than keys", 8, {{70, 40}}, nothing);
  add("shard", 16, {{30, 800, 700, 3}, {9, 500, 300, 1}}, [&](Case& c) {
    paged(c);
    c.q_offsets = c.block_offsets = true;
  });
  // Whole tiles.
  add("whole tiles", 16, {{150, 400}, {3, 260}, {0, 9}, {20, 20}}, nothing);
  add(
      "whole tiles, G 8, two heads, paged", 8, {{100, 300}, {69, 257}, {5, 0}},
      [&](Case& c) {
        paged(c);
        c.problem.heads_kv = 2;
        c.padded_rows = 2;
      },
      true);
  add("whole tiles, many sequences", 16, std::vector<SequenceSize>(35, {17, 20}), nothing);
  add("whole tiles, not causal, strided", 16, {{165, 300}}, [](Case& c) {
    c.causal = false;
    c.strided = c.loose_limits = true;
  });
  for (const auto& [name, values] : {std::pair{"zeros", Values::kZero},
                                     {"huge", Values::kHuge},
                                     {"peaked", Values::kPeaked},
                                     {"rising", Values::kRising},
                                     {"falling", Values::kFalling},
                                     {"giant", Values::kGiant},
                                     {"no numbers", Values::kNonFinite}})
    add(name, 16, {{9, 900}}, [values](Case& c) { c.values = values; });
  add("no numbers, whole tiles", 16, {{165, 300}, {20, 20}},
      [](Case& c) { c.values = Values::kNonFinite; });
  add("no numbers, one warpgroup, paged", 4, {{12, 261}, {5, 140}}, [&](Case& c) {
    paged(c);
    c.values = Values::kNonFinite;
  });
  return cases;
}

}  // namespace

Family make_family() { return family_of(dense::kernels(), make_cases); }

}  // namespace emulator
