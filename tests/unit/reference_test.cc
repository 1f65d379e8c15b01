// The reference against the formulas of the specification, written out here once more over plain
// arrays, and against examples worked out by hand.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "core/half.h"
#include "msa/msa.h"
#include "tensors.h"

namespace msa {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// One sequence: n keys, m queries at the end of them, blocks of 4.
struct Data {
  int64_t m, n, hq, hkv, d;
  std::vector<float> q, k, v;  // [m,hq,d], [n,hkv,d]

  Data(int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t dim, unsigned seed)
      : m(queries), n(keys), hq(heads), hkv(kv_heads), d(dim) {
    std::mt19937 random(seed);
    const auto fill = [&](std::vector<float>& x, int64_t size) {
      for (int64_t i = 0; i < size; ++i)
        x.push_back(static_cast<float>(random() % 2001) / 500.0f - 2.0f);
    };
    fill(q, m * hq * d);
    fill(k, n * hkv * d);
    fill(v, n * hkv * d);
  }
  double product(int64_t i, int64_t h, int64_t s) const {
    double sum = 0;
    for (int64_t c = 0; c < d; ++c)
      sum += double{q[static_cast<size_t>((i * hq + h) * d + c)]} *
             double{k[static_cast<size_t>((s * hkv + h / (hq / hkv)) * d + c)]};
    return sum;
  }
  double value(int64_t s, int64_t h, int64_t c) const {
    return v[static_cast<size_t>((s * hkv + h / (hq / hkv)) * d + c)];
  }
};

using Sees = std::function<bool(int64_t query, int64_t head, int64_t key)>;

/// softmax(q k^T * scale) v over the keys that `sees` admits: o [m,hq,d] and lse [m,hq].
void attend(const Data& x, double scale, const Sees& sees, std::vector<double>* o,
            std::vector<double>* lse) {
  for (int64_t i = 0; i < x.m; ++i) {
    for (int64_t h = 0; h < x.hq; ++h) {
      double sum = 0;
      std::vector<double> mean(static_cast<size_t>(x.d), 0.0);
      for (int64_t s = 0; s < x.n; ++s) {
        if (!sees(i, h, s)) continue;
        const double e = std::exp(x.product(i, h, s) * scale);
        sum += e;
        for (int64_t c = 0; c < x.d; ++c) mean[static_cast<size_t>(c)] += e * x.value(s, h, c);
      }
      for (double element : mean) o->push_back(sum > 0 ? element / sum : 0);
      lse->push_back(std::log(sum));  // -inf for an empty sum
    }
  }
}

void expect_near(const TensorView& got, const std::vector<double>& want) {
  ASSERT_EQ(got.numel(), static_cast<int64_t>(want.size()));
  for (size_t i = 0; i < want.size(); ++i) {
    const double g = got.at<float>()[i];
    if (std::isinf(want[i]))
      EXPECT_EQ(g, want[i]) << i;
    else
      EXPECT_NEAR(g, want[i], 1e-5 * (1 + std::abs(want[i]))) << i;
  }
}

Limits limits_of(const Data& x) {
  return {.max_batch = 1, .max_tokens = x.m, .max_seqlen_q = x.m, .max_seqlen_k = x.n};
}

class Reference : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Both, Reference, testing::Values("reference", "reference-f64"),
                         [](const auto& info) {
                           return std::string(info.param) == "reference" ? "f32" : "f64";
                         });

TEST_P(Reference, DenseAttentionIsTheFormula) {
  for (bool causal : {true, false}) {
    for (float scale : {0.0f, 0.3f}) {
      const Data x(5, 11, 6, 2, 7, 1);
      Tensors t;
      const DenseAttentionParams a{.q = t.floats({5, 6, 7}, x.q),
                                   .k = t.floats({11, 2, 7}, x.k),
                                   .v = t.floats({11, 2, 7}, x.v),
                                   .batch = {.cu_seqlens_q = t.ints({0, 5}),
                                             .cu_seqlens_k = t.ints({0, 11}),
                                             .causal = causal},
                                   .softmax_scale = scale,
                                   .o = t.make(DType::kF32, {5, 6, 7}),
                                   .lse = t.make(DType::kF32, {5, 6}),
                                   .block_max = t.make(DType::kF32, {6, 5, 3})};
      const Problem p{
          .op = Op::kDenseAttention, .heads_q = 6, .heads_kv = 2, .head_dim = 7, .block_size = 4};
      const Status status = call(p, limits_of(x), a, GetParam());
      ASSERT_TRUE(status.ok()) << status.message();
      const Sees sees = [&](int64_t i, int64_t, int64_t s) { return !causal || s <= 11 - 5 + i; };
      std::vector<double> o, lse, block_max(6 * 5 * 3, -kInf);
      attend(x, scale == 0 ? 1 / std::sqrt(7.0) : double{scale}, sees, &o, &lse);
      for (int64_t h = 0; h < 6; ++h) {
        for (int64_t i = 0; i < 5; ++i) {
          for (int64_t s = 0; s < 11; ++s) {
            double& best = block_max[static_cast<size_t>((h * 5 + i) * 3 + s / 4)];
            if (sees(i, h, s)) best = std::max(best, x.product(i, h, s));
          }
        }
      }
      expect_near(a.o, o);
      expect_near(a.lse, lse);
      expect_near(a.block_max, block_max);
    }
  }
}

TEST_P(Reference, SparseAttentionReadsTheListedBlocks) {
  const Data x(4, 18, 4, 2, 5, 2);  // positions 14..17, blocks 0..4, the last with two tokens
  const std::vector<int32_t> ids = {
      0,  2, 3, 3, -1, 1, 4, 0,  1, 1, 4, -1,  // head 0: any order, an end before the end
      -1, 0, 0, 3, 1,  0, 2, -1, 2, 4, 3, 2};  // head 1
  Tensors t;
  const SparseAttentionParams a{
      .q = t.floats({4, 4, 5}, x.q),
      .k = t.floats({18, 2, 5}, x.k),
      .v = t.floats({18, 2, 5}, x.v),
      .block_ids = t.ints({2, 4, 3}, ids),
      .batch = {.cu_seqlens_q = t.ints({0, 4}), .cu_seqlens_k = t.ints({0, 18})},
      .o = t.make(DType::kF32, {4, 4, 5}),
      .lse = t.make(DType::kF32, {4, 4})};
  const Problem p{.heads_q = 4, .heads_kv = 2, .head_dim = 5, .block_size = 4, .topk = 3};
  const Status status = call(p, limits_of(x), a, GetParam());
  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<double> o, lse;
  attend(
      x, 1 / std::sqrt(5.0),
      [&](int64_t i, int64_t h, int64_t s) {
        if (s > 14 + i) return false;
        for (int64_t slot = 0; slot < 3; ++slot) {
          const int32_t id = ids[static_cast<size_t>((h / 2 * 4 + i) * 3 + slot)];
          if (id == -1) return false;
          if (id == s / 4) return true;
        }
        return false;
      },
      &o, &lse);
  expect_near(a.o, o);
  expect_near(a.lse, lse);
  EXPECT_EQ(a.lse.at<float>()[2], -kInf);  // head 1's list of query 0 is empty
}

TEST_P(Reference, IndexScoresAreBlockMaxima) {
  const Data x(6, 13, 3, 1, 9, 3);  // one key head for three index heads
  Tensors t;
  const IndexScoresParams a{
      .q_idx = t.floats({6, 3, 9}, x.q),
      .k_idx = t.floats({13, 9}, x.k),
      .batch = {.cu_seqlens_q = t.ints({0, 6}), .cu_seqlens_k = t.ints({0, 13})},
      .scores = t.make(DType::kF32, {3, 6, 5})};
  const Problem p{.op = Op::kIndexScores, .heads_kv = 3, .index_dim = 9, .block_size = 4};
  ASSERT_TRUE(call(p, limits_of(x), a, GetParam()).ok());
  std::vector<double> want(3 * 6 * 5, -kInf);
  for (int64_t r = 0; r < 3; ++r) {
    for (int64_t i = 0; i < 6; ++i) {
      for (int64_t s = 0; s <= 13 - 6 + i; ++s) {
        double& best = want[static_cast<size_t>((r * 6 + i) * 5 + s / 4)];
        best = std::max(best, x.product(i, r, s));
      }
    }
  }
  expect_near(a.scores, want);
}

TEST_P(Reference, BlockMassSumsToOneAndIsTheMeanOverHeads) {
  const Data x(5, 10, 4, 2, 6, 4);
  Tensors t;
  const Batch batch{.cu_seqlens_q = t.ints({0, 5}), .cu_seqlens_k = t.ints({0, 10})};
  const TensorView q = t.floats({5, 4, 6}, x.q), k = t.floats({10, 2, 6}, x.k);
  const TensorView lse = t.make(DType::kF32, {5, 4});
  Problem p{.op = Op::kDenseAttention, .heads_q = 4, .heads_kv = 2, .head_dim = 6, .block_size = 4};
  const DenseAttentionParams dense{
      .q = q, .k = k, .v = k, .batch = batch, .o = t.make(DType::kF32, {5, 4, 6}), .lse = lse};
  ASSERT_TRUE(call(p, limits_of(x), dense, GetParam()).ok());
  p.op = Op::kBlockMass;
  const BlockMassParams a{
      .q = q, .k = k, .lse = lse, .batch = batch, .mass = t.make(DType::kF32, {2, 5, 3})};
  ASSERT_TRUE(call(p, limits_of(x), a, GetParam()).ok());
  std::vector<double> want(2 * 5 * 3, 0.0);
  for (int64_t h = 0; h < 4; ++h) {
    for (int64_t i = 0; i < 5; ++i) {
      double sum = 0;
      for (int64_t s = 0; s <= 5 + i; ++s) sum += std::exp(x.product(i, h, s) / std::sqrt(6.0));
      for (int64_t s = 0; s <= 5 + i; ++s)
        want[static_cast<size_t>((h / 2 * 5 + i) * 3 + s / 4)] +=
            std::exp(x.product(i, h, s) / std::sqrt(6.0)) / sum / 2;
    }
  }
  expect_near(a.mass, want);
  for (int64_t row = 0; row < 10; ++row) {
    const float* mass = a.mass.at<float>() + row * 3;
    EXPECT_NEAR(mass[0] + mass[1] + mass[2], 1, 1e-5);
  }
}

TEST_P(Reference, TwoKeysByHand) {
  // Equal logits average the values; a difference of ln 3 weighs them 1 : 3.
  Tensors t;
  const DenseAttentionParams a{
      .q = t.floats({2, 1, 1}, {0.0f, 1.0f}),
      .k = t.floats({2, 1, 1}, {0.0f, std::log(3.0f)}),
      .v = t.floats({2, 1, 1}, {4.0f, 8.0f}),
      .batch = {.cu_seqlens_q = t.ints({0, 2}), .cu_seqlens_k = t.ints({0, 2}), .causal = false},
      .softmax_scale = 1,
      .o = t.make(DType::kF32, {2, 1, 1}),
      .lse = t.make(DType::kF32, {2, 1})};
  const Problem p{
      .op = Op::kDenseAttention, .heads_q = 1, .heads_kv = 1, .head_dim = 1, .block_size = 1};
  ASSERT_TRUE(call(p, {1, 2, 2, 2}, a, GetParam()).ok());
  expect_near(a.o, {6, 7});
  expect_near(a.lse, {std::log(2.0), std::log(4.0)});
}

TEST_P(Reference, MergeOfPartsIsTheWhole) {
  const Data x(3, 20, 2, 1, 4, 5);
  const Sees all = [](int64_t, int64_t, int64_t) { return true; };
  std::vector<double> o, lse;
  attend(x, 0.5, all, &o, &lse);
  std::vector<float> o_parts, lse_parts;
  for (int64_t part = 0; part < 4; ++part) {  // keys 0..6, 7..13, 14..19, none
    std::vector<double> part_o, part_lse;
    attend(x, 0.5, [&](int64_t, int64_t, int64_t s) { return s / 7 == part; }, &part_o, &part_lse);
    for (double e : part_o) o_parts.push_back(part == 3 ? kNaN : static_cast<float>(e));
    for (double e : part_lse) lse_parts.push_back(static_cast<float>(e));
  }
  Tensors t;
  MergeParams a{.o_parts = t.floats({4, 3, 2, 4}, o_parts),
                .lse_parts = t.floats({4, 3, 2}, lse_parts),
                .o = t.make(DType::kF32, {3, 2, 4}),
                .lse = t.make(DType::kF32, {3, 2})};
  const Problem p{.op = Op::kMerge, .heads_q = 2, .head_dim = 4};
  ASSERT_TRUE(call(p, limits_of(x), a, GetParam()).ok());
  expect_near(a.o, o);
  expect_near(a.lse, lse);

  for (int64_t i = 0; i < 4; ++i) *a.lse_parts.at<float>(i, 1, 0) = -kInf;
  ASSERT_TRUE(call(p, limits_of(x), a, GetParam()).ok());
  EXPECT_EQ(*a.lse.at<float>(1, 0), -kInf);
  for (int64_t c = 0; c < 4; ++c) EXPECT_EQ(*a.o.at<float>(1, 0, c), 0.0f);
}

TEST_P(Reference, BlockListsByHand) {
  // Sequence 0: queries 0..2, blocks 0..2; sequence 1: query 3, blocks 0..1 (rows 3..4).
  Tensors t;
  const BlockListsParams a{
      .block_ids = t.ints({1, 5, 2}, {0, 2, 2, -1, 1, 0, 1, 0, 9, 9}),  // the last row is padding
      .batch = {.cu_seqlens_q = t.ints({0, 3, 4}), .seq_lens = t.ints({9, 8})},
      .row_ptr = t.make(DType::kI32, {1, 6}),
      .entries = t.make(DType::kI32, {1, 10})};
  const Problem p{
      .op = Op::kBlockLists, .layout = KvLayout::kPaged, .heads_kv = 1, .block_size = 4, .topk = 2};
  ASSERT_TRUE(call(p, {2, 5, 3, 9}, a, GetParam()).ok());
  EXPECT_EQ(values_of<int32_t>(a.row_ptr), (std::vector<int32_t>{0, 2, 3, 5, 6, 7}));
  // Entries are token * 2 + slot: block 0 is listed by tokens 0 and 2, block 1 by 2, block 2 by 0
  // and 1; block 0 of sequence 1 in slot 1 of token 3.
  EXPECT_EQ(values_of<int32_t>(a.entries), (std::vector<int32_t>{0, 5, 4, 1, 2, 7, 6, -1, -1, -1}));
}

TEST_P(Reference, AppendPagedByHand) {
  // Pages of 2. Sequence 0 has 3 tokens of which 2 are new: positions 1 and 2, pages 4 and 1.
  // Sequence 1 is padding. Sequence 2 has 1 new token at position 0, page 0.
  Tensors t;
  const std::vector<float> rows = {10, 11, 20, 21, 90, 91, 30, 31};
  const auto pool = [&] { return t.floats({5, 1, 2, 2}, std::vector<float>(20, 7.0f)); };
  const AppendPagedParams a{.k = t.floats({4, 1, 2}, rows),
                            .v = t.floats({4, 1, 2}, {-10, -11, -20, -21, -90, -91, -30, -31}),
                            .k_idx = t.floats({4, 2}, rows),
                            .batch = {.cu_seqlens_q = t.ints({0, 2, 3, 4}),
                                      .seq_lens = t.ints({3, 0, 1}),
                                      .page_table = t.ints({3, 2}, {4, 1, -5, -5, 0, 77})},
                            .k_pages = pool(),
                            .v_pages = pool(),
                            .k_idx_pages = t.floats({5, 2, 2}, std::vector<float>(20, 7.0f))};
  const Problem p{.op = Op::kAppendPaged,
                  .layout = KvLayout::kPaged,
                  .heads_kv = 1,
                  .head_dim = 2,
                  .index_dim = 2,
                  .block_size = 2};
  const Status status = call(p, {3, 4, 2, 3}, a, GetParam());
  ASSERT_TRUE(status.ok()) << status.message();
  std::vector<float> want(20, 7.0f);
  want[0] = 30, want[1] = 31;    // page 0, slot 0
  want[4] = 20, want[5] = 21;    // page 1, slot 0
  want[18] = 10, want[19] = 11;  // page 4, slot 1
  EXPECT_EQ(values_of<float>(a.k_pages), want);
  EXPECT_EQ(values_of<float>(a.k_idx_pages), want);
  for (float& x : want) x = x == 7 ? 7 : -x;
  EXPECT_EQ(values_of<float>(a.v_pages), want);
}

TEST_P(Reference, PagedAndStridedAreTheSameAsPacked) {
  const Data x(4, 11, 2, 2, 3, 6);
  Tensors t;
  const TensorView q = t.floats({4, 2, 3}, x.q);
  DenseAttentionParams packed{
      .q = q,
      .k = t.floats({11, 2, 3}, x.k),
      .v = t.floats({11, 2, 3}, x.v),
      .batch = {.cu_seqlens_q = t.ints({0, 4}), .cu_seqlens_k = t.ints({0, 11})},
      .o = t.make(DType::kF32, {4, 2, 3})};
  Problem p{.op = Op::kDenseAttention, .heads_q = 2, .heads_kv = 2, .head_dim = 3, .block_size = 4};
  ASSERT_TRUE(call(p, limits_of(x), packed, GetParam()).ok());

  // One pool [P,Bk,Hkv,2,D] of keys and values side by side; what no token fills is NaN.
  const int32_t table[] = {3, 0, 2};
  const TensorView pool = t.floats({5, 4 * 2 * 2 * 3}, std::vector<float>(5 * 48, kNaN));
  for (int64_t s = 0; s < 11; ++s)
    for (int64_t h = 0; h < 2; ++h)
      for (int64_t c = 0; c < 3; ++c) {
        float* at = pool.at<float>(table[s / 4], ((s % 4) * 2 + h) * 6 + c);
        at[0] = x.k[static_cast<size_t>((s * 2 + h) * 3 + c)];
        at[3] = x.v[static_cast<size_t>((s * 2 + h) * 3 + c)];
      }
  TensorView k = TensorView::contiguous(pool.data, DType::kF32, {5, 2, 4, 3});
  k.stride = {48, 6, 12, 1};
  TensorView v = k;
  v.data = pool.at<float>() + 3;
  DenseAttentionParams paged = packed;
  paged.k = k, paged.v = v;
  paged.batch = {.cu_seqlens_q = t.ints({0, 4}),
                 .seq_lens = t.ints({11}),
                 .page_table = t.ints({1, 4}, {3, 0, 2, 1000})};
  paged.o = t.make(DType::kF32, {4, 2, 3});
  p.layout = KvLayout::kPaged;
  const Status status = call(p, limits_of(x), paged, GetParam());
  ASSERT_TRUE(status.ok()) << status.message();
  EXPECT_EQ(values_of<float>(paged.o), values_of<float>(packed.o));
}

TEST_P(Reference, PaddingGivesZerosAndNothing) {
  // Sequence 0 has no keys, sequence 1 no queries, and the last two rows belong to nobody.
  const Data x(4, 5, 2, 1, 3, 7);
  Tensors t;
  const Batch batch{.cu_seqlens_q = t.ints({0, 2, 2}), .cu_seqlens_k = t.ints({0, 0, 5})};
  const SparseAttentionParams a{.q = t.floats({4, 2, 3}, std::vector<float>(24, kNaN)),
                                .k = t.floats({5, 1, 3}, x.k),
                                .v = t.floats({5, 1, 3}, x.v),
                                .block_ids = t.ints({1, 4, 1}, {-1, -1, 123456, -99}),
                                .batch = batch,
                                .o = t.make(DType::kF32, {4, 2, 3}),
                                .lse = t.make(DType::kF32, {4, 2})};
  const Problem p{.heads_q = 2, .heads_kv = 1, .head_dim = 3, .block_size = 4, .topk = 1};
  const Limits limits{2, 4, 2, 5};
  ASSERT_TRUE(call(p, limits, a, GetParam()).ok());
  EXPECT_EQ(values_of<float>(a.o), std::vector<float>(24, 0.0f));
  EXPECT_EQ(values_of<float>(a.lse), std::vector<float>(8, -kInf));

  const IndexSelectParams select{.q_idx = t.floats({4, 1, 3}, std::vector<float>(12, kNaN)),
                                 .k_idx = t.floats({5, 3}, x.k),
                                 .batch = batch,
                                 .block_ids = t.make(DType::kI32, {1, 4, 2}),
                                 .scores = t.make(DType::kF32, {1, 4, 2})};
  const Problem s{
      .op = Op::kIndexSelect, .heads_kv = 1, .index_dim = 3, .block_size = 4, .topk = 2};
  ASSERT_TRUE(call(s, limits, select, GetParam()).ok());
  EXPECT_EQ(values_of<int32_t>(select.block_ids), std::vector<int32_t>(8, -1));
  EXPECT_EQ(values_of<float>(select.scores), std::vector<float>(8, -kInf));
}

TEST_P(Reference, MoreQueriesThanKeys) {
  // Bottom-right: with 2 keys and 4 queries the first two stand before the sequence.
  const Data x(4, 2, 1, 1, 3, 8);
  Tensors t;
  const DenseAttentionParams a{
      .q = t.floats({4, 1, 3}, x.q),
      .k = t.floats({2, 1, 3}, x.k),
      .v = t.floats({2, 1, 3}, x.v),
      .batch = {.cu_seqlens_q = t.ints({0, 4}), .cu_seqlens_k = t.ints({0, 2})},
      .o = t.make(DType::kF32, {4, 1, 3}),
      .lse = t.make(DType::kF32, {4, 1})};
  const Problem p{
      .op = Op::kDenseAttention, .heads_q = 1, .heads_kv = 1, .head_dim = 3, .block_size = 4};
  ASSERT_TRUE(call(p, {1, 4, 4, 2}, a, GetParam()).ok());
  std::vector<double> o, lse;
  attend(x, 1 / std::sqrt(3.0), [](int64_t i, int64_t, int64_t s) { return s <= i - 2; }, &o, &lse);
  expect_near(a.o, o);
  expect_near(a.lse, lse);
}

TEST_P(Reference, SixteenBitInputsAreExact) {
  // Small integers have exact products in every type: all dtypes agree bit for bit.
  Tensors t;
  std::map<DType, std::vector<float>> scores;
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    std::mt19937 random(9);
    const TensorView q = t.make(dtype, {3, 2, 17}), k = t.make(dtype, {9, 17});
    for (const TensorView& view : {q, k})
      for (int64_t i = 0; i < view.numel(); ++i)
        store_f32(view.data, dtype, i, static_cast<float>(random() % 7) - 3.0f);
    const IndexScoresParams a{
        .q_idx = q,
        .k_idx = k,
        .batch = {.cu_seqlens_q = t.ints({0, 3}), .cu_seqlens_k = t.ints({0, 9})},
        .scores = t.make(DType::kF32, {2, 3, 3})};
    const Problem p{
        .op = Op::kIndexScores, .dtype = dtype, .heads_kv = 2, .index_dim = 17, .block_size = 4};
    ASSERT_TRUE(call(p, {1, 3, 3, 9}, a, GetParam()).ok());
    scores[dtype] = values_of<float>(a.scores);
  }
  EXPECT_EQ(scores[DType::kBF16], scores[DType::kF32]);
  EXPECT_EQ(scores[DType::kF16], scores[DType::kF32]);
}

TEST_P(Reference, ThreadsDoNotChangeResults) {
  const Data x(37, 50, 4, 2, 8, 10);
  Tensors t;
  DenseAttentionParams a{
      .q = t.floats({37, 4, 8}, x.q),
      .k = t.floats({50, 2, 8}, x.k),
      .v = t.floats({50, 2, 8}, x.v),
      .batch = {.cu_seqlens_q = t.ints({0, 20, 37}), .cu_seqlens_k = t.ints({0, 21, 50})},
      .o = t.make(DType::kF32, {37, 4, 8})};
  const Problem p{
      .op = Op::kDenseAttention, .heads_q = 4, .heads_kv = 2, .head_dim = 8, .block_size = 16};
  const Limits limits{
      .max_batch = 2, .max_tokens = 37, .max_seqlen_q = 20, .max_seqlen_k = 30, .max_threads = 3};
  ASSERT_TRUE(call(p, limits, a, GetParam()).ok());
  const std::vector<float> alone = values_of<float>(a.o);
  for (int count : {2, 3, 7}) {  // seven are more than the plan has scratch for
    Threads threads(count);
    a.o = t.make(DType::kF32, {37, 4, 8});
    ASSERT_TRUE(call(p, limits, a, GetParam(), &threads).ok());
    EXPECT_EQ(values_of<float>(a.o), alone) << count;
  }
}

TEST(ReferenceBackends, ComeLastAndTakeEverything) {
  const Backend* f32 = find_backend("reference");
  const Backend* f64 = find_backend("reference-f64");
  ASSERT_NE(f32, nullptr);
  ASSERT_NE(f64, nullptr);
  EXPECT_TRUE(f32->usable().ok());
  EXPECT_EQ(backends().back(), f64);
  EXPECT_EQ(backends()[backends().size() - 2], f32);
  const Problem odd{.heads_q = 7, .heads_kv = 7, .head_dim = 3, .block_size = 1, .topk = 2048};
  EXPECT_TRUE(f32->supports(odd).ok());
}

TEST(ReferenceBackends, DoubledIdsAreAnError) {
  const Data x(1, 8, 1, 1, 2, 11);
  Tensors t;
  const SparseAttentionParams a{
      .q = t.floats({1, 1, 2}, x.q),
      .k = t.floats({8, 1, 2}, x.k),
      .v = t.floats({8, 1, 2}, x.v),
      .block_ids = t.ints({1, 1, 4}, {1, 0, 1, -1}),
      .batch = {.cu_seqlens_q = t.ints({0, 1}), .cu_seqlens_k = t.ints({0, 8})},
      .o = t.make(DType::kF32, {1, 1, 2})};
  const Problem p{.heads_q = 1, .heads_kv = 1, .head_dim = 2, .block_size = 4, .topk = 4};
  EXPECT_EQ(call(p, limits_of(x), a).message(),
            "block_ids[0,0,2]: got 1 a second time, expected distinct blocks");
}

}  // namespace
}  // namespace msa
