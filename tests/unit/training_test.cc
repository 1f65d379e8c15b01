// Gradients against finite differences of the formulas in double precision, and facts that hold
// exactly: what nobody reads has no gradient, all blocks are dense attention, a student that has
// learned gets no gradient.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "msa/msa.h"
#include "tensors.h"

namespace msa {
namespace {

// One sequence: 5 queries at the end of 11 keys, blocks of 4, lists of 2.
constexpr int64_t kQueries = 5, kKeys = 11, kHeads = 4, kKvHeads = 2, kDim = 3, kIndexDim = 5;
constexpr int64_t kGroup = kHeads / kKvHeads;
constexpr float kScale = 0.7f;
const Problem kProblem{.heads_q = kHeads,
                       .heads_kv = kKvHeads,
                       .head_dim = kDim,
                       .index_dim = kIndexDim,
                       .block_size = 4,
                       .topk = 2};
const Limits kLimits{
    .max_batch = 1, .max_tokens = kQueries, .max_seqlen_q = kQueries, .max_seqlen_k = kKeys};

/// Lists of both heads and of every query; the second one of head 1 is short.
const std::vector<int32_t> kIds = {0, 1, 1, 0,  2, 0, 2, 1, 1, 2,   // head 0
                                   1, 0, 0, -1, 0, 2, 2, 1, 0, 1};  // head 1

using Values = std::vector<double>;

Values random_values(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  Values values;
  for (int64_t i = 0; i < count; ++i)
    values.push_back(static_cast<float>(random() % 2001) / 1000.0f - 1.0f);
  return values;
}

double dot(const Values& a, int64_t i, const Values& b, int64_t j, int64_t n) {
  double sum = 0;
  for (int64_t d = 0; d < n; ++d)
    sum += a[static_cast<size_t>(i * n + d)] * b[static_cast<size_t>(j * n + d)];
  return sum;
}

/// All numbers of the two losses, row-major in the shapes of ops.h.
struct Model {
  Values q = random_values(kQueries * kHeads * kDim, 1),
         k = random_values(kKeys * kKvHeads * kDim, 2),
         v = random_values(kKeys * kKvHeads * kDim, 3),
         d_o = random_values(kQueries * kHeads * kDim, 4),
         q_idx = random_values(kQueries * kKvHeads * kIndexDim, 5),
         k_idx = random_values(kKeys * kIndexDim, 6);
  bool sparse = true;

  bool sees(int64_t i, int64_t r, int64_t s) const {
    if (s > kKeys - kQueries + i) return false;
    if (!sparse) return true;
    const auto list = kIds.begin() + (r * kQueries + i) * 2;
    return std::find(list, list + 2, static_cast<int32_t>(s / 4)) != list + 2;
  }
  /// softmax of logit(s) over the keys that query i sees.
  Values softmax(int64_t i, int64_t r, const std::function<double(int64_t)>& logit) const {
    Values p(kKeys, 0.0);
    double sum = 0;
    for (int64_t s = 0; s < kKeys; ++s)
      if (sees(i, r, s)) sum += p[static_cast<size_t>(s)] = std::exp(logit(s));
    for (double& x : p) x /= sum;
    return p;
  }
  Values probabilities(int64_t i, int64_t h) const {
    const int64_t r = h / kGroup;
    return softmax(i, r, [&](int64_t s) {
      return double{kScale} * dot(q, i * kHeads + h, k, s * kKvHeads + r, kDim);
    });
  }
  /// Sum of o * d_o: its gradients are those of the backward pass.
  double attention() const {
    double loss = 0;
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t h = 0; h < kHeads; ++h) {
        const Values p = probabilities(i, h);
        for (int64_t s = 0; s < kKeys; ++s)
          loss += p[static_cast<size_t>(s)] *
                  dot(v, s * kKvHeads + h / kGroup, d_o, i * kHeads + h, kDim);
      }
    return loss;
  }
  double kl() const {
    double loss = 0;
    for (int64_t i = 0; i < kQueries; ++i)
      for (int64_t r = 0; r < kKvHeads; ++r) {
        Values teacher(kKeys, 0.0);
        for (int64_t h = r * kGroup; h < (r + 1) * kGroup; ++h) {
          const Values p = probabilities(i, h);
          for (size_t s = 0; s < p.size(); ++s) teacher[s] += p[s] / kGroup;
        }
        const Values student = softmax(i, r, [&](int64_t s) {
          return dot(q_idx, i * kKvHeads + r, k_idx, s, kIndexDim) / std::sqrt(double{kIndexDim});
        });
        for (size_t s = 0; s < teacher.size(); ++s)
          if (teacher[s] > 0) loss += teacher[s] * std::log(teacher[s] / student[s]);
      }
    return loss / (kQueries * kKvHeads);
  }
};

/// d loss / d values[i], central.
Values numerical_gradient(Values* values, const std::function<double()>& loss) {
  constexpr double kStep = 1e-5;
  Values gradient;
  for (double& x : *values) {
    const double at = x;
    x = at + kStep;
    const double above = loss();
    x = at - kStep;
    gradient.push_back((above - loss()) / (2 * kStep));
    x = at;
  }
  return gradient;
}

/// The model's numbers as arguments, with the forward pass done by the reference.
struct Arguments : Tensors {
  const Model& m;
  Batch batch{.cu_seqlens_q = ints({0, kQueries}), .cu_seqlens_k = ints({0, kKeys})};
  TensorView q = rows({kQueries, kHeads, kDim}, m.q), k = rows({kKeys, kKvHeads, kDim}, m.k),
             v = rows({kKeys, kKvHeads, kDim}, m.v), d_o = rows({kQueries, kHeads, kDim}, m.d_o),
             q_idx = rows({kQueries, kKvHeads, kIndexDim}, m.q_idx),
             k_idx = rows({kKeys, kIndexDim}, m.k_idx), ids{},
             o = make(DType::kF32, {kQueries, kHeads, kDim}),
             lse = make(DType::kF32, {kQueries, kHeads}),
             index_lse = make(DType::kF32, {kQueries, kKvHeads});

  explicit Arguments(const Model& model) : m(model) {
    if (m.sparse) ids = ints({kKvHeads, kQueries, 2}, kIds);
    if (m.sparse)
      expect_ok(Op::kSparseAttention, SparseAttentionParams{q, k, v, ids, batch, kScale, o, lse});
    else
      expect_ok(Op::kDenseAttention, DenseAttentionParams{q, k, v, batch, kScale, o, lse, {}});
    expect_ok(Op::kIndexLse, IndexLseParams{q_idx, k_idx, ids, batch, index_lse});
  }
  TensorView rows(std::initializer_list<int64_t> shape, const Values& values) {
    return floats(shape, {values.begin(), values.end()});
  }
  template <class Params>
  static void expect_ok(Op op, const Params& params) {
    Problem problem = kProblem;
    problem.op = op;
    const Status status = call(problem, kLimits, params, "reference-f64");
    EXPECT_TRUE(status.ok()) << status.message();
  }
  AttentionBackwardParams attention_backward() {
    AttentionBackwardParams a{.q = q,
                              .k = k,
                              .v = v,
                              .block_ids = ids,
                              .o = o,
                              .lse = lse,
                              .d_o = d_o,
                              .batch = batch,
                              .softmax_scale = kScale,
                              .dq = make(DType::kF32, {kQueries, kHeads, kDim}),
                              .dk = make(DType::kF32, {kKeys, kKvHeads, kDim}),
                              .dv = make(DType::kF32, {kKeys, kKvHeads, kDim})};
    expect_ok(m.sparse ? Op::kSparseAttentionBackward : Op::kDenseAttentionBackward, a);
    return a;
  }
  KlParams kl_backward() {
    KlParams a{.q = q,
               .k = k,
               .lse = lse,
               .q_idx = q_idx,
               .k_idx = k_idx,
               .index_lse = index_lse,
               .block_ids = ids,
               .batch = batch,
               .softmax_scale = kScale,
               .dq_idx = make(DType::kF32, {kQueries, kKvHeads, kIndexDim}),
               .dk_idx = make(DType::kF32, {kKeys, kIndexDim}),
               .kl = make(DType::kF32, {kQueries, kKvHeads})};
    expect_ok(Op::kKlBackward, a);
    return a;
  }
};

void expect_near(const char* what, const TensorView& got, const Values& want) {
  ASSERT_EQ(got.numel(), static_cast<int64_t>(want.size()));
  for (size_t i = 0; i < want.size(); ++i)  // o and lse are rounded to fp32
    EXPECT_NEAR(got.at<float>()[i], want[i], 1e-6) << what << " " << i;
}

TEST(Training, AttentionGradientsAreFiniteDifferences) {
  for (const bool sparse : {true, false}) {
    Model m;
    m.sparse = sparse;
    Arguments run(m);
    const AttentionBackwardParams made = run.attention_backward();
    const auto loss = [&] { return m.attention(); };
    expect_near("dq", made.dq, numerical_gradient(&m.q, loss));
    expect_near("dk", made.dk, numerical_gradient(&m.k, loss));
    expect_near("dv", made.dv, numerical_gradient(&m.v, loss));
  }
}

TEST(Training, KlGradientsAreFiniteDifferences) {
  for (const bool sparse : {true, false}) {
    Model m;
    m.sparse = sparse;
    Arguments run(m);
    const KlParams made = run.kl_backward();
    const auto loss = [&] { return m.kl(); };
    expect_near("dq_idx", made.dq_idx, numerical_gradient(&m.q_idx, loss));
    expect_near("dk_idx", made.dk_idx, numerical_gradient(&m.k_idx, loss));
    double mean = 0;
    for (float x : values_of<float>(made.kl)) mean += x / static_cast<double>(made.kl.numel());
    EXPECT_NEAR(mean, m.kl(), 1e-6);
  }
}

TEST(Training, AllBlocksAreDenseAttention) {
  Model m;
  m.sparse = false;
  Arguments run(m);
  const AttentionBackwardParams dense = run.attention_backward();
  AttentionBackwardParams sparse = dense;
  std::vector<int32_t> all;
  for (int64_t i = 0; i < kKvHeads * kQueries; ++i) all.insert(all.end(), {0, 1, 2});
  sparse.block_ids = run.ints({kKvHeads, kQueries, 3}, all);
  sparse.dq = run.make(DType::kF32, {kQueries, kHeads, kDim});
  sparse.dk = run.make(DType::kF32, {kKeys, kKvHeads, kDim});
  sparse.dv = run.make(DType::kF32, {kKeys, kKvHeads, kDim});
  Problem problem = kProblem;
  problem.op = Op::kSparseAttentionBackward;
  problem.topk = 3;
  ASSERT_TRUE(call(problem, kLimits, sparse, "reference-f64").ok());
  EXPECT_EQ(values_of<float>(sparse.dq), values_of<float>(dense.dq));
  EXPECT_EQ(values_of<float>(sparse.dk), values_of<float>(dense.dk));
  EXPECT_EQ(values_of<float>(sparse.dv), values_of<float>(dense.dv));
}

/// Every backend that trains, by name.
std::vector<const Backend*> trainers(Op op) {
  Problem problem = kProblem;
  problem.op = op;
  std::vector<const Backend*> out;
  for (const Backend* backend : backends())
    if (backend->device == DeviceKind::kCPU && backend->usable().ok() &&
        backend->supports(problem).ok())
      out.push_back(backend);
  return out;
}

TEST(Training, WhatNobodyReadsHasNoGradient) {
  Model m;
  Arguments run(m);
  // Nobody lists block 1 any more; the lists of block 2 are of queries that see it.
  const std::vector<int32_t> ids = {0, -1, 0, 2, 2, 0, 0, -1, 2, -1,
                                    0, -1, 0, 2, 2, 0, 0, -1, 2, -1};
  for (const Backend* backend : trainers(Op::kKlBackward)) {
    AttentionBackwardParams a = run.attention_backward();
    a.block_ids = run.ints({kKvHeads, kQueries, 2}, ids);
    Problem problem = kProblem;
    problem.op = Op::kSparseAttentionBackward;
    ASSERT_TRUE(call(problem, kLimits, a, backend->name).ok());
    KlParams kl = run.kl_backward();
    kl.block_ids = a.block_ids;
    problem.op = Op::kKlBackward;
    ASSERT_TRUE(call(problem, kLimits, kl, backend->name).ok());
    for (int64_t s = 0; s < kKeys; ++s) {
      const bool read = s / 4 != 1;
      EXPECT_EQ(*a.dv.at<float>(s, 0, 0) != 0, read) << backend->name << " key " << s;
      EXPECT_EQ(*a.dk.at<float>(s, 1, 2) != 0, read) << backend->name << " key " << s;
      EXPECT_EQ(*kl.dk_idx.at<float>(s, 4) != 0, read) << backend->name << " key " << s;
    }
  }
}

TEST(Training, AStudentThatHasLearnedGetsNoGradient) {
  // One head per group, and the index branch is the attention.
  Tensors t;
  const Problem problem{
      .op = Op::kKlBackward, .heads_q = 1, .heads_kv = 1, .head_dim = 3, .index_dim = 3};
  const Values q = random_values(kKeys * 3, 1), k = random_values(kKeys * 3, 2);
  const TensorView rows = t.floats({kKeys, 1, 3}, {q.begin(), q.end()});
  const TensorView keys = t.floats({kKeys, 1, 3}, {k.begin(), k.end()});
  const TensorView index_keys = t.floats({kKeys, 3}, {k.begin(), k.end()});
  const Batch batch{.cu_seqlens_q = t.ints({0, kKeys}), .cu_seqlens_k = t.ints({0, kKeys})};
  const Limits limits{
      .max_batch = 1, .max_tokens = kKeys, .max_seqlen_q = kKeys, .max_seqlen_k = kKeys};
  const TensorView lse = t.make(DType::kF32, {kKeys, 1});
  Problem forward = problem;
  forward.op = Op::kIndexLse;
  ASSERT_TRUE(call(forward, limits, IndexLseParams{rows, index_keys, {}, batch, lse}).ok());
  for (const Backend* backend : trainers(Op::kKlBackward)) {
    const KlParams a{.q = rows,
                     .k = keys,
                     .lse = lse,
                     .q_idx = rows,
                     .k_idx = index_keys,
                     .index_lse = lse,
                     .batch = batch,
                     .dq_idx = t.make(DType::kF32, {kKeys, 1, 3}),
                     .dk_idx = t.make(DType::kF32, {kKeys, 3}),
                     .kl = t.make(DType::kF32, {kKeys, 1})};
    ASSERT_TRUE(call(problem, limits, a, backend->name).ok());
    for (float x : values_of<float>(a.dq_idx)) EXPECT_NEAR(x, 0, 1e-7) << backend->name;
    for (float x : values_of<float>(a.dk_idx)) EXPECT_NEAR(x, 0, 1e-7) << backend->name;
    for (float x : values_of<float>(a.kl)) EXPECT_NEAR(x, 0, 1e-6) << backend->name;
  }
}

TEST(Training, AmxSaysThatItDoesNotTrain) {
  const Backend* amx = find_backend("amx");
  if (amx == nullptr) GTEST_SKIP() << "this build has no x86 backends";
  Problem problem = kProblem;
  problem.dtype = DType::kBF16;
  problem.op = Op::kIndexLse;
  EXPECT_EQ(amx->supports(problem).message(),
            "op: got index_lse, supported: index_scores, index_select, sparse_attention, "
            "dense_attention, block_mass, msa_layer");
}

}  // namespace
}  // namespace msa
