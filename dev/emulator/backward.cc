// Attention backward, sparse and dense.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/backward/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace backward = msa::cuda::sm90::backward;

/// Sizes around those of tiles, tasks and blocks, and every feature of a batch. A task has 64
/// queries here. The arguments say whether there are inverse lists: two seeds of most cases.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const char* name, int group, int topk, std::vector<SequenceSize> sequences,
                       auto&& change, bool bad_metadata = false) {
    Case c;
    c.name = name;
    c.problem = {
        .op = Op::kSparseAttentionBackward, .dtype = DType::kBF16, .heads_kv = 1, .topk = topk};
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    cases.push_back({fitting(c, backend), bad_metadata});
    if (c.problem.op == Op::kDenseAttentionBackward) return;
    Case other = c;  // with lists where the first has none, or the reverse
    const auto has_lists = [](const Case& c) {
      Instance instance(c, 16);
      return std::get<AttentionBackwardParams>(instance.params()).row_ptr.given();
    };
    const bool had_lists = has_lists(cases.back().c);
    other.seed = cases.back().c.seed;
    do {
      other = fitting(other, backend, other.seed + 1);
    } while (has_lists(other) == had_lists);
    other.name += had_lists ? ", no lists" : ", lists";
    cases.push_back({other, bad_metadata});
  };
  const auto dense = [](Case& c) { c.problem.op = Op::kDenseAttentionBackward; };
  // What is missing of a CTA's first tile has nothing in shared memory but the NaN of the start.
  add("part of a tile", 16, 16, {{3, 3}}, [](Case&) {});
  add("one tile", 16, 16, {{4, 4}}, [](Case&) {});
  add("one block", 16, 16, {{128, 128}}, [](Case&) {}, true);
  add("ragged", 16, 4, kRagged, [](Case& c) { c.padded_rows = 3; });
  add(
      "G 8, two heads", 8, 16, {{130, 130}, {3, 3}, {70, 110}},
      [](Case& c) { c.problem.heads_kv = 2; }, true);
  add("G 8, K 1", 8, 1, {{150, 500}}, [](Case&) {});
  add("K 5, two heads, f32", 16, 5, {{33, 400}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 21;
  });
  add("not causal", 16, 8, {{23, 600}}, [](Case& c) { c.causal = false; });
  add("shard", 16, 8, {{30, 700, 700, 3}}, [](Case& c) { c.q_offsets = c.block_offsets = true; });
  add("long lists", 16, 16, {{21, 2500}}, [](Case& c) { c.values = Values::kPeaked; });
  add("more queries than keys", 8, 16, {{170, 40}}, [](Case&) {});
  add("strided, one list for all heads", 8, 8, {{40, 1000}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.strided = c.shared_ids = c.loose_limits = true;
  });
  add("many sequences", 16, 4, std::vector<SequenceSize>(35, {3, 3}), [](Case&) {});
  for (int group : {8, 16}) {  // without inverse lists, which name every mention
    Case c;
    c.name = text("repeated ids, G ", group);
    c.problem = {.op = Op::kSparseAttentionBackward,
                 .dtype = DType::kBF16,
                 .heads_q = group,
                 .heads_kv = 1,
                 .topk = 4};
    c.sequences = {{20, 300}, {40, 500}};
    c.repeated_ids = true;
    cases.push_back({fitting(c, backend)});
  }
  add("giant", 16, 4, {{20, 300}, {40, 200}}, [](Case& c) { c.values = Values::kGiant; });
  add("dense, giant", 8, 16, {{20, 300}}, [&](Case& c) {
    dense(c);
    c.values = Values::kGiant;
  });
  add("dense", 16, 16, {{150, 300}}, dense, true);
  add("dense, ragged, f32", 8, 16, {{1, 1}, {60, 60}, {0, 17}, {5, 0}, {33, 140}}, [&](Case& c) {
    dense(c);
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 5;
  });
  add("dense, blocks of 32", 16, 40, {{60, 60}, {33, 300}}, [&](Case& c) {
    dense(c);
    c.problem.block_size = 32;
  });
  add("dense, many sequences", 16, 16, std::vector<SequenceSize>(35, {3, 3}), dense);
  add("dense, not causal, strided", 8, 16, {{20, 300}}, [&](Case& c) {
    dense(c);
    c.causal = false;
    c.strided = true;
  });
  return cases;
}

}  // namespace

Family make_family() { return family_of(backward::kernels(), make_cases); }

}  // namespace emulator
