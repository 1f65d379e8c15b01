// Properties of block selection, for every backend of this machine: what is chosen is a pure
// function of the scores, and shards of the keys combine to the whole.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "msa/msa.h"
#include "tensors.h"

namespace msa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Select : public testing::TestWithParam<const Backend*> {
 protected:
  /// Why this machine or this backend cannot do it; empty if it can.
  std::string missing(const Problem& problem) {
    const Status usable = GetParam()->usable();
    return usable.ok() ? GetParam()->supports(problem).message() : usable.message();
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, Select, testing::ValuesIn(backends().begin(), backends().end()),
                         [](const auto& info) {
                           std::string name = info.param->name;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

struct Row {
  std::vector<float> scores;
  int32_t valid;
};

std::vector<std::vector<int32_t>> select(const Backend* backend, const Problem& problem,
                                         const std::vector<Row>& rows) {
  Tensors t;
  const int64_t n = static_cast<int64_t>(rows.size());
  const int64_t blocks = static_cast<int64_t>(rows[0].scores.size());
  const SelectBlocksParams a{.scores = t.make(DType::kF32, {1, n, blocks}),
                             .num_valid_blocks = t.make(DType::kI32, {n}),
                             .block_ids = t.make(DType::kI32, {1, n, problem.topk})};
  for (int64_t i = 0; i < n; ++i) {
    const Row& row = rows[static_cast<size_t>(i)];
    std::copy(row.scores.begin(), row.scores.end(), a.scores.at<float>(0, i));
    a.num_valid_blocks.at<int32_t>()[i] = row.valid;
  }
  const Limits limits{.max_tokens = n, .max_seqlen_k = blocks * problem.block_size};
  const Status status = call(problem, limits, a, backend->name);
  EXPECT_TRUE(status.ok()) << status.message();
  std::vector<std::vector<int32_t>> lists;
  for (int64_t i = 0; i < n; ++i)
    lists.emplace_back(a.block_ids.at<int32_t>(0, i), a.block_ids.at<int32_t>(0, i) + problem.topk);
  return lists;
}

/// By definition: a block is chosen if it is forced, or if fewer blocks beat it than there are
/// slots that the forced ones leave.
std::vector<int32_t> by_definition(const Problem& p, const Row& row) {
  const auto forced = [&](int j) { return j < p.init_blocks || j >= row.valid - p.local_blocks; };
  const auto value = [&](int j) {
    const float score = row.scores[static_cast<size_t>(j)];
    return std::isnan(score) ? -kInf : score;
  };
  int slots = p.topk;
  for (int j = 0; j < row.valid; ++j) slots -= forced(j) ? 1 : 0;
  std::vector<int32_t> ids;
  for (int j = 0; j < row.valid; ++j) {
    int better = 0;
    for (int i = 0; i < row.valid; ++i)
      if (!forced(i) && (value(i) > value(j) || (value(i) == value(j) && i < j))) ++better;
    if (forced(j) || better < slots) ids.push_back(j);
  }
  ids.resize(static_cast<size_t>(p.topk), -1);
  return ids;
}

Problem select_problem(int topk, int init = 0, int local = 1) {
  return {.op = Op::kSelectBlocks,
          .heads_q = 1,
          .heads_kv = 1,
          .block_size = 32,
          .topk = topk,
          .init_blocks = init,
          .local_blocks = local};
}

/// Scores with as many surprises as fit.
std::vector<float> random_scores(int64_t blocks, std::mt19937& random) {
  std::vector<float> scores(static_cast<size_t>(blocks));
  const auto kind = random() % 5;
  for (float& x : scores) {
    const float uniform = static_cast<float>(random() % 100000) / 777.0f - 64.0f;
    const float few[] = {-1.0f, -0.0f, 0.0f, 1.0f};
    const float special[] = {kNaN, -kNaN, -kInf, kInf, 0.0f, -0.0f, 3.0f, -3e38f};
    switch (kind) {
      case 0:
        x = uniform;
        break;
      case 1:
        x = few[random() % 4];
        break;
      case 2:
        x = special[random() % 8];
        break;
      case 3:
        x = 0.5f;
        break;
      default:
        x = random() % 3 == 0 ? uniform : few[random() % 4];
    }
  }
  return scores;
}

TEST_P(Select, IsTheDefinition) {
  if (const std::string why = missing(select_problem(4)); !why.empty()) GTEST_SKIP() << why;
  std::mt19937 random(1);
  for (int round = 0; round < 60; ++round) {
    const int topk = std::vector<int>{1, 2, 3, 4, 7, 8, 16, 17, 32}[random() % 9];
    const int local = static_cast<int>(random() % static_cast<unsigned>(std::min(topk, 4) + 1));
    const int init =
        static_cast<int>(random() % static_cast<unsigned>(std::min(topk - local, 3) + 1));
    const Problem p = select_problem(topk, init, local);
    const int64_t blocks = 1 + random() % (round % 10 == 0 ? 1000 : 90);
    std::vector<Row> rows;
    for (int i = 0; i < 20; ++i)
      rows.push_back({random_scores(blocks, random),
                      static_cast<int32_t>(random() % static_cast<unsigned>(blocks + 1))});
    const auto lists = select(GetParam(), p, rows);
    for (size_t i = 0; i < rows.size(); ++i) {
      ASSERT_EQ(lists[i], by_definition(p, rows[i]))
          << "K " << topk << " init " << init << " local " << local << " blocks " << blocks
          << " valid " << rows[i].valid << " round " << round;
      // The same once more, as properties one can read.
      const auto end = std::find(lists[i].begin(), lists[i].end(), -1);
      EXPECT_EQ(end - lists[i].begin(), std::min(topk, rows[i].valid));
      EXPECT_TRUE(std::is_sorted(lists[i].begin(), end));
      EXPECT_TRUE(std::all_of(end, lists[i].end(), [](int32_t id) { return id == -1; }));
    }
  }
}

TEST_P(Select, ZerosOfBothSignsAreEqual) {
  if (const std::string why = missing(select_problem(3)); !why.empty()) GTEST_SKIP() << why;
  const Problem p = select_problem(3);
  const auto lists = select(GetParam(), p,
                            {{{-0.0f, 0.0f, -0.0f, 0.0f, -5.0f}, 5},
                             {{0.0f, -0.0f, 0.0f, -0.0f, -5.0f}, 5},
                             {{-1.0f, -0.0f, -1.0f, 0.0f, -5.0f}, 5}});
  EXPECT_EQ(lists[0], (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(lists[1], (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(lists[2], (std::vector<int32_t>{1, 3, 4}));
}

TEST_P(Select, NaNIsMinusInfinityAndForcedBlocksNeedNoScore) {
  if (const std::string why = missing(select_problem(3)); !why.empty()) GTEST_SKIP() << why;
  const Problem p = select_problem(3);
  const auto lists = select(GetParam(), p,
                            {{{kNaN, -kInf, kNaN, kNaN, kNaN}, 5},
                             {{kNaN, -3e38f, kNaN, -3.1e38f, kNaN}, 5},
                             {{kInf, kInf, kInf, kInf, -kInf}, 5}});
  EXPECT_EQ(lists[0], (std::vector<int32_t>{0, 1, 4}));
  EXPECT_EQ(lists[1], (std::vector<int32_t>{1, 3, 4}));
  EXPECT_EQ(lists[2], (std::vector<int32_t>{0, 1, 4}));
}

TEST_P(Select, TheOrderOfLosersDoesNotMatter) {
  if (const std::string why = missing(select_problem(8)); !why.empty()) GTEST_SKIP() << why;
  std::mt19937 random(2);
  for (int round = 0; round < 50; ++round) {
    const Problem p = select_problem(8, static_cast<int>(random() % 3), 1);
    Row row{random_scores(60, random), 60};
    const std::vector<int32_t> first = select(GetParam(), p, {row})[0];
    // Permute the scores of all blocks below the lowest winner.
    const auto value = [&](int32_t j) {
      const float x = row.scores[static_cast<size_t>(j)];
      return std::isnan(x) ? -kInf : x;
    };
    float lowest = kInf;
    for (int32_t id : first)
      if (id >= p.init_blocks && id < 59) lowest = std::min(lowest, value(id));
    std::vector<size_t> losers;
    for (int32_t j = p.init_blocks; j < 59; ++j)
      if (value(j) < lowest) losers.push_back(static_cast<size_t>(j));
    std::vector<size_t> shuffled = losers;
    std::shuffle(shuffled.begin(), shuffled.end(), random);
    const std::vector<float> before = row.scores;
    for (size_t i = 0; i < losers.size(); ++i) row.scores[losers[i]] = before[shuffled[i]];
    ASSERT_EQ(select(GetParam(), p, {row})[0], first);
  }
}

TEST_P(Select, AWinnerStaysOneWhenItsScoreRises) {
  if (const std::string why = missing(select_problem(6)); !why.empty()) GTEST_SKIP() << why;
  std::mt19937 random(3);
  const Problem p = select_problem(6);
  for (int round = 0; round < 50; ++round) {
    Row row{random_scores(40, random), 40};
    const std::vector<int32_t> first = select(GetParam(), p, {row})[0];
    const size_t winner = static_cast<size_t>(first[random() % 6]);
    row.scores[winner] = kInf;
    const std::vector<int32_t> again = select(GetParam(), p, {row})[0];
    EXPECT_NE(std::find(again.begin(), again.end(), static_cast<int32_t>(winner)), again.end());
  }
}

// ---- shards ----

constexpr int64_t kBlock = 16, kBlocks = 12, kKeys = kBlock * kBlocks - 5, kQueries = 30, kDim = 64;

struct Shard {
  int64_t first_block, end_block;
  int64_t begin() const { return first_block * kBlock; }
  int64_t keys() const { return std::min(end_block * kBlock, kKeys) - begin(); }
};
const std::vector<Shard> kShards = {{0, 4}, {4, 5}, {5, 12}};

/// Rows begin .. begin + count - 1 of a packed tensor.
TensorView slice(TensorView view, int64_t begin, int64_t count) {
  view.data = view.at<float>(begin);
  view.shape[0] = count;
  return view;
}

Batch shard_batch(Tensors& t, const Shard& shard) {
  return {.cu_seqlens_q = t.ints({0, static_cast<int32_t>(kQueries)}),
          .cu_seqlens_k = t.ints({0, static_cast<int32_t>(shard.keys())}),
          .q_offset = t.ints({static_cast<int32_t>(kKeys - kQueries)}),
          .block_offset = t.ints({static_cast<int32_t>(shard.first_block)})};
}

Batch whole_batch(Tensors& t) {
  return {.cu_seqlens_q = t.ints({0, static_cast<int32_t>(kQueries)}),
          .cu_seqlens_k = t.ints({0, static_cast<int32_t>(kKeys)})};
}

constexpr Limits kShardLimits{
    .max_batch = 1, .max_tokens = kQueries, .max_seqlen_q = kQueries, .max_seqlen_k = kKeys};

void fill(const TensorView& view, std::mt19937& random, int range) {
  for (int64_t i = 0; i < view.numel(); ++i)
    view.at<float>()[i] = static_cast<float>(random() % static_cast<unsigned>(2 * range + 1)) -
                          static_cast<float>(range);
}

TEST_P(Select, TheBestOfShardsAreTheBest) {
  // Small integers: scores are exact, and many are equal.
  const Problem p{.op = Op::kIndexSelect,
                  .heads_q = 2,
                  .heads_kv = 2,
                  .index_dim = kDim,
                  .block_size = kBlock,
                  .topk = 5,
                  .init_blocks = 1,
                  .local_blocks = 2};
  if (const std::string why = missing(p); !why.empty()) GTEST_SKIP() << why;
  Tensors t;
  std::mt19937 random(4);
  const TensorView q = t.make(DType::kF32, {kQueries, 2, kDim});
  const TensorView k = t.make(DType::kF32, {kKeys, kDim});
  fill(q, random, 1);
  fill(k, random, 1);
  const auto make = [&](const TensorView& keys, const Batch& batch) {
    return IndexSelectParams{.q_idx = q,
                             .k_idx = keys,
                             .batch = batch,
                             .block_ids = t.make(DType::kI32, {2, kQueries, 5}),
                             .scores = t.make(DType::kF32, {2, kQueries, 5})};
  };
  const IndexSelectParams whole = make(k, whole_batch(t));
  ASSERT_TRUE(call(p, kShardLimits, whole, GetParam()->name).ok());
  std::vector<IndexSelectParams> parts;
  for (const Shard& shard : kShards) {
    parts.push_back(make(slice(k, shard.begin(), shard.keys()), shard_batch(t, shard)));
    const Status status = call(p, kShardLimits, parts.back(), GetParam()->name);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t i = 0; i < kQueries; ++i) {
      std::vector<std::pair<float, int32_t>> candidates;  // (-score, id): the best come first
      for (const IndexSelectParams& part : parts)
        for (int64_t slot = 0; slot < 5; ++slot)
          if (const int32_t id = *part.block_ids.at<int32_t>(r, i, slot); id != -1)
            candidates.emplace_back(-*part.scores.at<float>(r, i, slot), id);
      std::sort(candidates.begin(), candidates.end());
      candidates.resize(5);
      std::vector<int32_t> best;
      for (const auto& [score, id] : candidates) best.push_back(id);
      std::sort(best.begin(), best.end());
      const int32_t* want = whole.block_ids.at<int32_t>(r, i);
      ASSERT_EQ(best, std::vector<int32_t>(want, want + 5)) << "head " << r << " query " << i;
    }
  }
}

TEST_P(Select, AttentionOverShardsMergesToTheWhole) {
  Problem p{.op = Op::kSparseAttention,
            .heads_q = 6,
            .heads_kv = 2,
            .head_dim = kDim,
            .block_size = kBlock,
            .topk = 5};
  if (const std::string why = missing(p); !why.empty()) GTEST_SKIP() << why;
  Tensors t;
  std::mt19937 random(5);
  const TensorView q = t.make(DType::kF32, {kQueries, 6, kDim});
  const TensorView k = t.make(DType::kF32, {kKeys, 2, kDim});
  const TensorView v = t.make(DType::kF32, {kKeys, 2, kDim});
  const TensorView ids = t.make(DType::kI32, {2, kQueries, 5});
  for (const TensorView& view : {q, k, v}) {
    fill(view, random, 100);
    for (int64_t i = 0; i < view.numel(); ++i) view.at<float>()[i] *= 0.01f;
  }
  for (int64_t list = 0; list < 2 * kQueries; ++list) {
    std::vector<int32_t> blocks(kBlocks);
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random);
    std::copy_n(blocks.begin(), 5, ids.at<int32_t>() + list * 5);
  }
  const int64_t parts = static_cast<int64_t>(kShards.size());
  const TensorView o_parts = t.make(DType::kF32, {parts, kQueries, 6, kDim});
  const TensorView lse_parts = t.make(DType::kF32, {parts, kQueries, 6});
  const auto part = [](TensorView view, int64_t i) {
    view.data = view.at<float>(i);
    --view.rank;
    std::rotate(view.shape.begin(), view.shape.begin() + 1, view.shape.end());
    std::rotate(view.stride.begin(), view.stride.begin() + 1, view.stride.end());
    return view;
  };
  SparseAttentionParams whole{.q = q,
                              .k = k,
                              .v = v,
                              .block_ids = ids,
                              .batch = whole_batch(t),
                              .o = t.make(DType::kF32, {kQueries, 6, kDim}),
                              .lse = t.make(DType::kF32, {kQueries, 6})};
  ASSERT_TRUE(call(p, kShardLimits, whole, GetParam()->name).ok());
  for (int64_t i = 0; i < parts; ++i) {
    const Shard& shard = kShards[static_cast<size_t>(i)];
    SparseAttentionParams a = whole;
    a.k = slice(k, shard.begin(), shard.keys());
    a.v = slice(v, shard.begin(), shard.keys());
    a.batch = shard_batch(t, shard);
    a.o = part(o_parts, i);
    a.lse = part(lse_parts, i);
    const Status status = call(p, kShardLimits, a, GetParam()->name);
    ASSERT_TRUE(status.ok()) << status.message();
  }
  p.op = Op::kMerge;
  const MergeParams merge{.o_parts = o_parts,
                          .lse_parts = lse_parts,
                          .o = t.make(DType::kF32, {kQueries, 6, kDim}),
                          .lse = t.make(DType::kF32, {kQueries, 6})};
  ASSERT_TRUE(call(p, kShardLimits, merge, GetParam()->name).ok());
  for (int64_t i = 0; i < merge.o.numel(); ++i)
    ASSERT_NEAR(merge.o.at<float>()[i], whole.o.at<float>()[i], 2e-6) << i;
  for (int64_t i = 0; i < merge.lse.numel(); ++i)
    ASSERT_NEAR(merge.lse.at<float>()[i], whole.lse.at<float>()[i], 1e-5) << i;
}

}  // namespace
}  // namespace msa
