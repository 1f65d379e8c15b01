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
/// queries here. Most cases come with and without inverse lists.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  // `lists`: inverse lists are given, or not.
  const auto push = [&](const Case& c, bool lists, bool bad_metadata) {
    const auto wanted = [&](const Params& params) {
      return std::get<AttentionBackwardParams>(params).row_ptr.given() == lists;
    };
    cases.push_back({fitting(c, backend, wanted), bad_metadata});
  };
  const auto add = [&](const char* name, int group, int topk, std::vector<SequenceSize> sequences,
                       auto&& change, bool bad_metadata = false) {
    Case c;
    c.name = name;
    c.problem = {
        .op = Op::kSparseAttentionBackward, .dtype = DType::kBF16, .heads_kv = 1, .topk = topk};
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    push(c, false, bad_metadata);
    if (c.problem.op == Op::kDenseAttentionBackward || c.repeated_ids) return;
    c.name += ", lists";
    push(c, true, bad_metadata);
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
  const auto repeated = [](Case& c) { c.repeated_ids = true; };
  add("repeated ids", 16, 4, {{3, 3}, {40, 500}}, repeated);  // inverse lists name every mention
  add("repeated ids, G 8", 8, 4, {{3, 3}, {40, 500}}, repeated);
  add("giant", 16, 4, {{20, 20}, {40, 300}}, [](Case& c) { c.values = Values::kGiant; });
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
