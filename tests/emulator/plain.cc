// The plain kernels: the smoke suite's cases of all that walks keys or queries, training first of
// all, and a few of training with sizes around those of warps, chunks and blocks.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cuda/smxx/plain.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;

bool walks(Op op) {
  return is_training(op) || op == Op::kSparseAttention || op == Op::kDenseAttention ||
         op == Op::kBlockLists || op == Op::kBlockMass || op == Op::kMergeLists;
}

/// About as many products as queries make with all keys, and keys with their gradients.
int64_t work_of(const Case& c) {
  int64_t pairs = 0;
  for (const SequenceSize& s : c.sequences) pairs += (s.q_len + int64_t{1}) * s.kv_len;
  return pairs * c.problem.heads_q * c.problem.head_dim;
}

/// Each with every operator of training.
void add_training(std::vector<EmulatedCase>* cases) {
  const auto add = [&](const char* name, Problem problem, std::vector<SequenceSize> sequences,
                       auto&& change) {
    for (Op op : {Op::kSparseAttentionBackward, Op::kDenseAttentionBackward, Op::kIndexLse,
                  Op::kKlBackward, Op::kKlLoss}) {
      for (uint64_t seed = 1; seed <= 3; ++seed) {  // with and without lists, ids, f32 inputs
        Case c;
        c.name = text(msa::name_of(op), " ", name, " ", seed);
        c.problem = problem;
        c.problem.op = op;
        c.problem.heads_q = problem.heads_q * problem.heads_kv;
        c.seed = seed;
        c.optional = true;
        c.sequences = sequences;
        change(c);
        cases->push_back({std::move(c), /*bad_metadata=*/true});
      }
    }
  };
  // heads_q: G
  add("G 16, Bk 128", {.heads_q = 16, .heads_kv = 1, .head_dim = 64, .index_dim = 32, .topk = 2},
      {{40, 300}}, [](Case&) {});
  add("G 3, Bk 32, ragged",
      {.dtype = DType::kBF16,
       .heads_q = 3,
       .heads_kv = 2,
       .head_dim = 40,
       .index_dim = 64,
       .block_size = 32,
       .topk = 3},
      {{1, 1}, {33, 33}, {0, 17}, {5, 0}, {20, 101}, {9, 4}}, [](Case& c) {
        c.padded_rows = 2;
        c.loose_limits = true;
      });
  add("G 1, Bk 16, strided",
      {.dtype = DType::kF16,
       .heads_q = 1,
       .heads_kv = 3,
       .head_dim = 16,
       .index_dim = 17,
       .block_size = 16,
       .topk = 40},
      {{70, 70}, {31, 150}}, [](Case& c) { c.strided = c.f32_outputs = true; });
  add("G 21, Bk 8, not causal",
      {.heads_q = 21, .heads_kv = 1, .head_dim = 24, .index_dim = 24, .block_size = 8, .topk = 4},
      {{12, 37}, {7, 90}}, [](Case& c) { c.causal = false; });
  add("G 2, Bk 5, shard",
      {.heads_q = 2, .heads_kv = 2, .head_dim = 16, .index_dim = 16, .block_size = 5, .topk = 6},
      {{20, 48, 40, 3}, {9, 33, 20, 1}},
      [](Case& c) { c.q_offsets = c.block_offsets = c.shared_ids = true; });
}

}  // namespace

Family make_family() {
  Family family{.backends = {on_host("cuda-plain", msa::cuda::plain::kernels())}, .cases = {}};
  add_training(&family.cases);
  constexpr int64_t kMostWork = 8'000'000;
  int left_out = 0;
  for (Case& c : msa::conformance::make_cases(Suite::kSmoke)) {
    if (!walks(c.problem.op)) continue;
    if (work_of(c) > kMostWork) {
      ++left_out;
      continue;
    }
    c.name = text(msa::name_of(c.problem.op), " ", c.name);
    family.cases.push_back({std::move(c)});
  }
  std::printf(
      "left out, as they would take minutes here: %d smoke cases of more than %lld products\n",
      left_out, static_cast<long long>(kMostWork));
  return family;
}

}  // namespace emulator
