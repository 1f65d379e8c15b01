// The index branch of prefill and of short extends: index_scores, select_blocks and index_select.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/index/config.h"
#include "cuda/sm90/index/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace index = msa::cuda::sm90::index;

/// How index_select goes about a call.
enum class Way {
  kNarrow,  ///< few rows: every score, then the choice
  kWhole,   ///< a list per row, whole tiles
  kScores,  ///< parts of tiles: every score, then the choice
  kLists,   ///< parts of tiles: a list per row and part, then their merge
};
Way way_of(const Case& c) {
  const Limits limits = Instance(c, 16).limits();
  if (index::is_narrow(c.problem, limits)) return Way::kNarrow;
  if (index::splits(c.problem, limits) == 1) return Way::kWhole;
  return index::keeps_scores(c.problem, limits) ? Way::kScores : Way::kLists;
}

/// Every way, sizes around those of tiles, parts and blocks, and every feature of a batch.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const std::string& name, Op op, int heads, int topk,
                       std::vector<SequenceSize> sequences, auto&& change,
                       bool bad_metadata = false) {
    Case c;
    c.name = text(msa::name_of(op), ": ", name);
    c.problem = {
        .op = op, .dtype = DType::kBF16, .heads_q = heads, .heads_kv = heads, .topk = topk};
    c.optional = true;
    c.sequences = std::move(sequences);
    change(c);
    cases.push_back({fitting(std::move(c), backend), bad_metadata});
  };
  const auto select = [&](Way way, const std::string& name, int heads, int topk,
                          std::vector<SequenceSize> sequences, auto&& change,
                          bool bad_metadata = false) {
    add(name, Op::kIndexSelect, heads, topk, std::move(sequences), change, bad_metadata);
    if (way_of(cases.back().c) != way)
      fail(text(cases.back().c.name, " goes another way than the case is for").c_str());
  };
  const auto nothing = [](Case&) {};
  const auto paged = [](Case& c) { c.problem.layout = KvLayout::kPaged; };
  const auto forced = [](Case& c) {
    c.problem.init_blocks = 1;
    c.problem.local_blocks = 2;
  };
  const auto shard = [&](Case& c) {
    paged(c);
    c.q_offsets = c.block_offsets = true;
  };

  select(Way::kNarrow, "one key", 4, 16, {{1, 1}}, nothing);
  select(Way::kNarrow, "one token, paged", 4, 16, {{1, 5000}}, paged);
  select(
      Way::kNarrow, "short extends", 4, 5,
      {{1, 129}, {3, 2500}, {0, 77}, {16, 2}, {1, 0}, {16, 700}},
      [&](Case& c) {
        paged(c);
        forced(c);
        c.padded_rows = 3;
      },
      true);
  select(Way::kNarrow, "many sequences", 1, 2, std::vector<SequenceSize>(70, {2, 300}), nothing,
         true);
  select(Way::kNarrow, "16 tokens of a shard", 2, 3, {{16, 900, 1000, 3}, {9, 500, 300, 1}}, shard);

  select(Way::kWhole, "one block", 4, 16, {{128, 128}}, nothing, true);
  select(Way::kWhole, "ragged, paged", 4, 1, {{1, 1}, {160, 400}, {0, 17}, {70, 70}, {5, 0}},
         [&](Case& c) {
           paged(c);
           c.padded_rows = 66;
         });
  select(Way::kWhole, "long lists, 64 heads", 64, 16, {{21, 2500}}, paged);
  select(Way::kWhole, "more queries than keys", 8, 2, {{170, 40}}, nothing);
  select(Way::kWhole, "strided, forced blocks", 4, 4, {{330, 700}}, [&](Case& c) {
    forced(c);
    c.strided = true;
  });

  select(Way::kScores, "one sequence", 2, 4, {{70, 1000}}, nothing, true);
  select(Way::kScores, "shard", 4, 2, {{17, 700, 800, 3}, {9, 800, 300, 1}}, shard);
  select(Way::kLists, "one sequence", 4, 5, {{100, 2600}}, nothing, true);
  select(
      Way::kLists, "ragged, paged, forced blocks", 4, 16, {{70, 3000}, {3, 130}},
      [&](Case& c) {
        paged(c);
        forced(c);
        c.padded_rows = 9;
      },
      true);
  select(Way::kLists, "shard", 4, 8, {{70, 3000, 4000, 3}}, shard);
  for (const auto& [name, values] : {std::pair{"ties", Values::kTies},
                                     {"equal keys", Values::kEqual},
                                     {"zeros", Values::kZero},
                                     {"huge", Values::kHuge},
                                     {"not finite", Values::kNonFinite}}) {
    const auto change = [values](Case& c) { c.values = values; };
    select(Way::kNarrow, name, 4, 3, {{2, 1500}}, change);
    select(Way::kWhole, name, 8, 2, {{150, 500}}, change);
    select(Way::kLists, name, 4, 3, {{45, 3000}}, change);
    add(name, Op::kSelectBlocks, 2, 4, {{30, 6000}}, change);
  }

  add("ragged", Op::kIndexScores, 4, 1, kRagged, [](Case& c) { c.padded_rows = 3; }, true);
  add("short extends", Op::kIndexScores, 4, 1, {{1, 129}, {3, 2500}, {0, 77}, {16, 2}, {1, 0}},
      paged, true);
  add("shard", Op::kIndexScores, 2, 1, {{70, 800, 1000, 3}, {9, 500, 300, 1}}, shard);

  add("a CTA per row", Op::kSelectBlocks, 1, 16, {{3, 700'000}}, nothing, true);
  add("a warp per row", Op::kSelectBlocks, 3, 32, {{41, 150'000}}, forced, true);
  add("few blocks", Op::kSelectBlocks, 4, 16, {{40, 1500}}, forced, true);
  return cases;
}

}  // namespace

Family make_family() { return family_of(index::kernels(), make_cases); }

}  // namespace emulator
