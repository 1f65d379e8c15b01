// Names, validation of problems, and the cost model.
#include <gtest/gtest.h>

#include <functional>
#include <set>
#include <string>

#include "core/op_table.h"
#include "msa/msa.h"

namespace msa {
namespace {

TEST(Names, AreDistinctAndKnown) {
  std::set<std::string> names;
  for (const OpInfo& op : all_ops()) names.insert(name_of(op.op));
  EXPECT_EQ(names.size(), all_ops().size());
  EXPECT_STREQ(name_of(Op::kBlockMass), "block_mass");
  EXPECT_STREQ(name_of(static_cast<Op>(99)), "unknown");
  EXPECT_STREQ(name_of(static_cast<Op>(4)), "unknown");
  EXPECT_STREQ(name_of(static_cast<Op>(-1)), "unknown");
  EXPECT_STREQ(name_of(DType::kE2M1), "e2m1");
  EXPECT_STREQ(name_of(static_cast<DType>(99)), "unknown");
}

TEST(Names, OldOnesAreKnown) {
  EXPECT_EQ(find_op("sparse_decode"), &info_of(Op::kSparseAttention));
  EXPECT_EQ(find_op("msa_layer_decode"), &info_of(Op::kLayer));
  EXPECT_EQ(find_op("sparse"), nullptr);
  for (const OpInfo& op : all_ops()) EXPECT_EQ(find_op(op.name), &op);
}

struct BadProblem {
  const char* field;
  const char* value;
  std::function<void(Problem&)> change;
};

TEST(Validate, NamesFieldAndValue) {
  const BadProblem bad[] = {
      {"op", "99", [](Problem& p) { p.op = static_cast<Op>(99); }},
      {"op", "4", [](Problem& p) { p.op = static_cast<Op>(4); }},
      {"op", "-1", [](Problem& p) { p.op = static_cast<Op>(-1); }},
      {"dtype", "i32", [](Problem& p) { p.dtype = DType::kI32; }},
      {"dtype", "e4m3", [](Problem& p) { p.dtype = DType::kE4M3; }},
      {"dtype", "unknown", [](Problem& p) { p.dtype = static_cast<DType>(77); }},
      {"layout", "2", [](Problem& p) { p.layout = static_cast<KvLayout>(2); }},
      {"layout", "packed", [](Problem& p) { p.op = Op::kAppendPaged; }},
      {"layout", "paged", [](Problem& p) { p.op = Op::kKlBackward, p.layout = KvLayout::kPaged; }},
      {"device", "5", [](Problem& p) { p.device.kind = static_cast<DeviceKind>(5); }},
      {"heads_q", "0", [](Problem& p) { p.heads_q = 0; }},
      {"heads_q", "65", [](Problem& p) { p.heads_q = 65; }},
      {"heads_kv", "-4", [](Problem& p) { p.heads_kv = -4; }},
      {"head_dim", "0", [](Problem& p) { p.head_dim = 0; }},
      {"index_dim", "-1", [](Problem& p) { p.op = Op::kIndexScores, p.index_dim = -1; }},
      {"block_size", "0", [](Problem& p) { p.block_size = 0; }},
      {"topk", "0", [](Problem& p) { p.topk = 0; }},
      {"init_blocks", "-1", [](Problem& p) { p.op = Op::kSelectBlocks, p.init_blocks = -1; }},
      {"local_blocks", "-2", [](Problem& p) { p.op = Op::kIndexSelect, p.local_blocks = -2; }},
      {"init_blocks + local_blocks", "10 + 7",
       [](Problem& p) { p.op = Op::kIndexSelect, p.init_blocks = 10, p.local_blocks = 7; }},
  };
  for (const BadProblem& b : bad) {
    Problem p;
    ASSERT_TRUE(validate(p).ok());
    b.change(p);
    const Status status = validate(p);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << b.field;
    EXPECT_EQ(status.message().find(std::string(b.field) + ": got "), 0u) << status.message();
    EXPECT_NE(status.message().find(b.value), std::string::npos) << status.message();
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
  }
}

TEST(Validate, IgnoresWhatTheOperatorDoesNotUse) {
  const Problem merge{.op = Op::kMerge, .heads_q = 3, .heads_kv = 0, .block_size = 0, .topk = 0};
  EXPECT_TRUE(validate(merge).ok());
  EXPECT_GT(cost(merge, 5, 5).bytes, 0);
  const Problem index{.op = Op::kIndexScores, .heads_q = 1, .heads_kv = 4, .head_dim = 0};
  EXPECT_TRUE(validate(index).ok());
  const Problem forced{.op = Op::kSparseAttention, .topk = 1, .init_blocks = 5};
  EXPECT_TRUE(validate(forced).ok());
}

TEST(Validate, Limits) {
  EXPECT_TRUE(validate(Limits{}).ok());
  EXPECT_TRUE(validate(Limits{0, 0, 0, 0, 0}).ok());
  const auto message = [](const Limits& limits) { return validate(limits).message(); };
  EXPECT_EQ(message({.max_batch = -1}), "max_batch: got -1, expected 0..2147483647");
  EXPECT_EQ(message({.max_tokens = -7}), "max_tokens: got -7, expected 0..2147483647");
  EXPECT_EQ(message({.max_seqlen_q = -1}), "max_seqlen_q: got -1, expected 0..2147483647");
  EXPECT_EQ(message({.max_seqlen_k = int64_t{1} << 31}),
            "max_seqlen_k: got 2147483648, expected 0..2147483647");
  EXPECT_EQ(message({.max_threads = -3}), "max_threads: got -3, expected >= 0");
}

TEST(Cost, PaperRatioOfMiniMaxM3) {
  const Problem m3;
  EXPECT_NEAR(paper_flop_ratio(m3, 32 << 10), 6.4, 1e-9);
  EXPECT_NEAR(paper_flop_ratio(m3, 128 << 10), 16.0, 1e-9);
  EXPECT_NEAR(paper_flop_ratio(m3, 512 << 10), 25.6, 1e-9);
  EXPECT_NEAR(paper_flop_ratio(m3, 1 << 20), 28.444444444, 1e-6);
}

TEST(Cost, PaperRatioOfSmallModel) {
  const Problem small{.heads_q = 16, .heads_kv = 2};
  EXPECT_NEAR(paper_flop_ratio(small, 32 << 10), 16 / 3.0, 1e-9);
  EXPECT_NEAR(paper_flop_ratio(small, 128 << 10), 32 / 3.0, 1e-9);
}

/// Pairs counted one by one: key s of query position pos, all of them or those in the local block
/// and the K - 1 blocks before it (which blocks they are does not change their number of keys).
struct Counted {
  int64_t dense = 0, sparse = 0;
};
Counted count(const Problem& p, int64_t q_len, int64_t kv_len) {
  Counted n;
  for (int64_t pos = kv_len - q_len; pos < kv_len; ++pos) {
    for (int64_t s = 0; s <= pos; ++s) {
      ++n.dense;
      if (pos / p.block_size - s / p.block_size < p.topk) ++n.sparse;
    }
  }
  return n;
}

TEST(Cost, FlopsAreExactOnVisiblePairs) {
  for (const auto& [q_len, kv_len] : {std::pair{1, 1},
                                      {1, 777},
                                      {64, 64},
                                      {65, 65},
                                      {300, 300},
                                      {17, 511},
                                      {0, 40},
                                      {128, 129}}) {
    for (int topk : {1, 2, 3, 16}) {
      for (int block : {1, 8, 64}) {
        Problem p{.heads_q = 6,
                  .heads_kv = 3,
                  .head_dim = 20,
                  .index_dim = 12,
                  .block_size = block,
                  .topk = topk};
        const Counted n = count(p, q_len, kv_len);
        const auto flops = [&](Op op) {
          p.op = op;
          return cost(p, q_len, kv_len).flops;
        };
        EXPECT_EQ(flops(Op::kIndexScores), 2.0 * 3 * 12 * static_cast<double>(n.dense));
        EXPECT_EQ(flops(Op::kIndexSelect), 2.0 * 3 * 12 * static_cast<double>(n.dense));
        EXPECT_EQ(flops(Op::kDenseAttention), 4.0 * 6 * 20 * static_cast<double>(n.dense));
        EXPECT_EQ(flops(Op::kBlockMass), 2.0 * 6 * 20 * static_cast<double>(n.dense));
        EXPECT_EQ(flops(Op::kLayer), flops(Op::kIndexSelect) + flops(Op::kSparseAttention));
        EXPECT_EQ(flops(Op::kSparseAttention), 4.0 * 6 * 20 * static_cast<double>(n.sparse));
        EXPECT_EQ(flops(Op::kSelectBlocks), 0.0);
        const double pair = 2.0 * 6 * 20, index = 2.0 * 3 * 12;
        const auto dense = static_cast<double>(n.dense), sparse = static_cast<double>(n.sparse);
        EXPECT_EQ(flops(Op::kSparseAttentionBackward), 5 * pair * sparse);
        EXPECT_EQ(flops(Op::kDenseAttentionBackward), 5 * pair * dense);
        EXPECT_EQ(flops(Op::kIndexLse), index * sparse);
        EXPECT_EQ(flops(Op::kKlBackward), (pair + 3 * index) * sparse);
        EXPECT_EQ(flops(Op::kKlLoss), (pair + index) * sparse);
      }
    }
  }
}

TEST(Cost, ManyBlocksMakeSparseDense) {
  Problem p{.block_size = 32, .topk = 100};
  const double sparse = cost(p, 50, 3000).flops;
  p.op = Op::kDenseAttention;
  EXPECT_EQ(sparse, cost(p, 50, 3000).flops);
}

TEST(Cost, Bytes) {
  // Dense, bf16: q and o [4,8,16], lse [4,8] f32, K and V [100,2,16].
  Problem p{.op = Op::kDenseAttention,
            .dtype = DType::kBF16,
            .heads_q = 8,
            .heads_kv = 2,
            .head_dim = 16,
            .index_dim = 32,
            .block_size = 10,
            .topk = 3};
  const double q = 4 * 8 * 16 * 2, lse = 4 * 8 * 4, keys = 100 * 2 * 16 * 2;
  EXPECT_EQ(cost(p, 4, 100).bytes, 2 * q + lse + 2 * keys);

  // Decode reads the blocks of each token: 27, 28, 29 and 30 keys. ids [2,4,3].
  p.op = Op::kSparseAttention;
  const double ids = 2 * 4 * 3 * 4;
  EXPECT_EQ(cost(p, 4, 100).bytes, 2 * q + lse + ids + 2 * (27 + 28 + 29 + 30) * 2 * 16 * 2.0);
  // Prefill reads the context once.
  p.op = Op::kSparseAttention;
  EXPECT_EQ(cost(p, 20, 100).bytes, 5 * (2 * q + lse + ids) + 2 * keys);

  // Index: q_idx [4,2,32], k_idx [100,32], scores [2,4,10] or ids.
  p.op = Op::kIndexScores;
  EXPECT_EQ(cost(p, 4, 100).bytes, (4 * 2 * 32 + 100 * 32) * 2.0 + 2 * 4 * 10 * 4);
  p.op = Op::kIndexSelect;
  EXPECT_EQ(cost(p, 4, 100).bytes, (4 * 2 * 32 + 100 * 32) * 2.0 + ids);
  p.op = Op::kSelectBlocks;
  EXPECT_EQ(cost(p, 4, 100).bytes, 2 * 4 * 10 * 4 + ids);
  p.op = Op::kBlockLists;
  EXPECT_EQ(cost(p, 4, 100).bytes, 2 * ids + 2 * 11 * 4);
  p.op = Op::kAppendPaged;
  EXPECT_EQ(cost(p, 4, 100).bytes, 2 * 4 * (2 * 2 * 16 + 32) * 2.0);
  p.op = Op::kMerge;
  EXPECT_EQ(cost(p, 4, 100).bytes, 3 * (q + lse));

  // Backward: q, o, d_o and dq; K, V, dK and dV. KL: index rows read, and their gradients written.
  const double index_rows = (4 * 2 * 32 + 100 * 32) * 2.0, index_lse = 4 * 2 * 4;
  p.op = Op::kDenseAttentionBackward;
  EXPECT_EQ(cost(p, 4, 100).bytes, 4 * q + lse + 4 * keys);
  p.op = Op::kSparseAttentionBackward;
  EXPECT_EQ(cost(p, 4, 100).bytes, 4 * q + lse + ids + 4 * keys);
  p.op = Op::kIndexLse;
  EXPECT_EQ(cost(p, 4, 100).bytes, index_rows + ids + index_lse);
  p.op = Op::kKlBackward;
  EXPECT_EQ(cost(p, 4, 100).bytes, q + lse + keys + 2 * index_rows + index_lse + ids);
  p.op = Op::kKlLoss;
  EXPECT_EQ(cost(p, 4, 100).bytes, q + lse + keys + index_rows + 2 * index_lse + ids);
}

TEST(Cost, DecodeTrafficOfMiniMaxM3) {
  // 2048 bytes of K and V and 256 of index key per context token; 4.19 MB of selected K and V.
  Problem m3{.op = Op::kDenseAttention, .dtype = DType::kBF16};
  const int64_t n = 1 << 20;
  EXPECT_NEAR(cost(m3, 1, n).bytes / n, 2048, 1);
  m3.op = Op::kIndexSelect;
  EXPECT_NEAR(cost(m3, 1, n).bytes / n, 256, 1);
  m3.op = Op::kSparseAttention;
  EXPECT_NEAR(cost(m3, 1, n).bytes, 4.19e6, 5e4);
}

}  // namespace
}  // namespace msa
