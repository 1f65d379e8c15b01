// Decode: the choice of blocks, attention over lists, and the layer that joins the two.
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "cuda/sm90/decode/family.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace decode = msa::cuda::sm90::decode;

/// Clusters of every size (config.h; 34 SMs here), sizes around those of blocks and shares, and
/// every feature of a batch.
std::vector<EmulatedCase> make_cases(const Backend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add_one = [&](Op op, const char* name, int group, int topk,
                           const std::vector<SequenceSize>& sequences, auto&& change,
                           bool bad_metadata) {
    Case c;
    c.name = text(msa::name_of(op), ": ", name);
    c.problem = {
        .op = op, .dtype = DType::kBF16, .layout = KvLayout::kPaged, .heads_kv = 1, .topk = topk};
    c.optional = true;
    c.sequences = sequences;
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    cases.push_back({fitting(std::move(c), backend), bad_metadata});
  };
  const auto add = [&](const char* name, int group, int topk,
                       const std::vector<SequenceSize>& sequences, auto&& change,
                       bool bad_metadata = false) {
    for (Op op : {Op::kIndexSelect, Op::kSparseAttention, Op::kLayer})
      add_one(op, name, group, topk, sequences, change, bad_metadata);
  };
  const auto nothing = [](Case&) {};
  const auto heads = [](int count) { return [=](Case& c) { c.problem.heads_kv = count; }; };
  add("cluster of 16", 16, 16, {{1, 5000}}, nothing, true);
  add("cluster of 16, two heads, G 8", 8, 16, {{1, 4001}}, heads(2));
  add("cluster of 16, fewer blocks", 16, 16, {{1, 700}}, nothing);
  add("one key", 16, 16, {{1, 1}}, nothing);
  add("no keys", 8, 16, {{1, 0}}, nothing);
  add("cluster of 8, forced blocks", 8, 5, {{3, 3333}}, [](Case& c) {
    c.problem.init_blocks = 1;
    c.problem.local_blocks = 2;
  });
  add("cluster of 4, not causal, f32", 16, 4, {{4, 1900}, {2, 257}}, [](Case& c) {
    c.causal = false;
    c.f32_outputs = true;
  });
  add("cluster of 2, ragged", 16, 8, {{1, 129}, {3, 2500}, {0, 77}, {2, 2}, {1, 0}, {1, 128}},
      heads(2), true);
  add("cluster of 2, shard", 8, 8, {{3, 800, 1000, 3}, {4, 500, 600, 1}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.q_offsets = c.block_offsets = true;
    c.padded_rows = 1;
  });
  add("16 tokens, many blocks", 16, 16, {{16, 34000}, {2, 1500}}, nothing);
  add(
      "many sequences", 4, 3, std::vector<SequenceSize>(35, {1, 900}),
      [](Case& c) { c.strided = true; }, true);
  add("more tokens than keys, padding", 2, 2, {{8, 3}, {5, 300}, {7, 130}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.padded_rows = 3;
  });
  for (const auto& [name, values] : kEveryValues)
    add_one(
        Op::kLayer, name, 16, 8, {{5, 1500}, {4, 1100}}, [values](Case& c) { c.values = values; },
        false);
  add_one(
      Op::kSparseAttention, "no numbers", 16, 8, {{5, 1500}, {4, 1100}},
      [](Case& c) { c.values = Values::kNonFinite; }, false);
  add_one(
      Op::kSparseAttention, "K 32, one list for all heads", 16, 32, {{1, 9000}, {1, 2000}},
      [](Case& c) {
        c.problem.heads_kv = 4;
        c.strided = c.shared_ids = c.loose_limits = true;
      },
      true);
  return cases;
}

}  // namespace

Family make_family() { return family_of(decode::kernels(), make_cases); }

}  // namespace emulator
