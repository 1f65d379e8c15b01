// The CPU device's functions against their formulas in double.
#include "model/compute.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "core/half.h"
#include "model/routing.h"

namespace msa::model {
namespace {

std::vector<float> random_floats(size_t count, uint32_t seed, float scale = 1) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

double d(float value) { return static_cast<double>(value); }

class ComputeTest : public testing::Test {
 protected:
  Norm make_norm(const std::vector<float>& weight, float eps) {
    Norm norm{.weight = {}, .dim = static_cast<int64_t>(weight.size()), .eps = eps};
    EXPECT_TRUE(Buffer::create(*compute_, weight, &norm.weight).ok());
    return norm;
  }

  std::unique_ptr<Compute> compute_ = make_cpu_compute(3);
};

TEST_F(ComputeTest, MatmulIsRowsTimesRows) {
  const int64_t rows = 37, n = 29, k = 50;
  const auto w = random_floats(n * k, 1), x = random_floats(rows * k, 2);
  std::vector<float> y(rows * n, NAN);
  const auto matrix = compute_->upload(w.data(), DType::kF32, n, k);
  EXPECT_EQ(matrix->rows(), n);
  EXPECT_EQ(matrix->columns(), k);
  compute_->matmul(*matrix, x.data(), rows, y.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = 0;
      for (int64_t c = 0; c < k; ++c)
        sum += d(x[static_cast<size_t>(i * k + c)]) * d(w[static_cast<size_t>(j * k + c)]);
      EXPECT_NEAR(y[static_cast<size_t>(i * n + j)], sum, 1e-4);
    }
}

TEST_F(ComputeTest, AddNormIsGemmaForm) {
  const size_t rows = 21, dim = 70;
  auto x = random_floats(rows * dim, 3);
  const auto delta = random_floats(rows * dim, 4);
  const auto weight = random_floats(dim, 5);
  const Norm norm = make_norm(weight, 1e-3f);
  std::vector<float> y(rows * dim), sum(rows * dim);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] = x[i] + delta[i];
  compute_->add_norm(norm, x.data(), delta.data(), rows, y.data());
  EXPECT_EQ(x, sum);
  for (size_t row = 0; row < rows; ++row) {
    double squares = 0;
    for (size_t c = 0; c < dim; ++c) squares += d(sum[row * dim + c]) * d(sum[row * dim + c]);
    const double scale = 1 / std::sqrt(squares / dim + 1e-3);
    for (size_t c = 0; c < dim; ++c)
      EXPECT_NEAR(y[row * dim + c], d(sum[row * dim + c]) * scale * (1 + d(weight[c])), 1e-5);
  }
  compute_->add_norm(norm, x.data(), nullptr, rows, y.data());
  EXPECT_EQ(x, sum);
}

// The lowest row of any norm counts, then the first norm; asking forgets.
TEST_F(ComputeTest, NormsNoteRowsThatAreNoNumbers) {
  const size_t rows = 50, dim = 32;
  const Norm norm = make_norm(std::vector<float>(dim), 1e-6f);
  std::vector<float> y(rows * dim), turns(rows * 2, 1.0f);
  const auto add_norm = [&](std::vector<std::pair<size_t, float>> changes) {
    auto x = random_floats(rows * dim, 6);
    for (const auto& [row, value] : changes) x[row * dim + 5] = value;
    compute_->add_norm(norm, x.data(), nullptr, rows, y.data());
  };
  const auto norm_rope = [&](size_t row, float value) {  // two heads in a row
    auto x = random_floats(rows * dim, 7);
    x[row * dim + dim - 1] = value;
    compute_->norm_rope(norm, x.data(), rows / 2, 2, turns.data(), 2, y.data(), DType::kF32);
  };
  const auto expect = [&](int64_t row, int64_t call) {
    const std::optional<BadRow> bad = compute_->bad_row();
    ASSERT_TRUE(bad.has_value());
    EXPECT_EQ(bad->row, row);
    EXPECT_EQ(bad->call, call);
    EXPECT_FALSE(compute_->bad_row().has_value());
  };
  EXPECT_FALSE(compute_->bad_row().has_value());
  add_norm({{3, 1e18f}});
  EXPECT_FALSE(compute_->bad_row().has_value());
  add_norm({{40, NAN}, {31, INFINITY}, {49, -INFINITY}});
  expect(31, 0);
  add_norm({});
  norm_rope(37, NAN);       // row 18
  add_norm({{18, NAN}});    // later
  add_norm({{20, 1e20f}});  // its square is infinity
  expect(18, 1);
  norm_rope(36, 1e30f);
  expect(18, 0);
}

TEST_F(ComputeTest, NormRopeTurnsTheFirstChannelsOfEachHead) {
  const size_t rows = 18, heads = 3, dim = 20;
  const int32_t rotary = 12, half = rotary / 2;
  const int64_t first = 1000;
  const double theta = 500;
  const auto x = random_floats(rows * heads * dim, 6);
  const auto weight = random_floats(dim, 7);
  const Norm norm = make_norm(weight, 1e-6f);
  std::vector<float> turns(rows * rotary), used = x, y(x.size());
  compute_->rope_angles(first, rows, rotary, theta, turns.data());
  compute_->norm_rope(norm, used.data(), rows, heads, turns.data(), rotary, y.data(), DType::kF32);
  for (size_t row = 0; row < rows; ++row)
    for (size_t h = 0; h < heads; ++h) {
      const size_t at = (row * heads + h) * dim;
      double squares = 0;
      std::vector<double> head(dim);
      for (size_t c = 0; c < dim; ++c) squares += d(x[at + c]) * d(x[at + c]);
      for (size_t c = 0; c < dim; ++c)
        head[c] = d(x[at + c]) / std::sqrt(squares / dim + 1e-6) * (1 + d(weight[c]));
      for (int32_t c = 0; c < half; ++c) {
        const double angle = static_cast<double>(first + static_cast<int64_t>(row)) *
                             std::pow(theta, -2.0 * c / rotary);
        const auto low = static_cast<size_t>(c), high = low + static_cast<size_t>(half);
        const double a = head[low], b = head[high];
        head[low] = a * std::cos(angle) - b * std::sin(angle);
        head[high] = b * std::cos(angle) + a * std::sin(angle);
      }
      for (size_t c = 0; c < dim; ++c) EXPECT_NEAR(y[at + c], head[c], 1e-3) << c;
    }
  // 16-bit results are the same values, rounded.
  std::vector<uint16_t> rounded(x.size());
  used = x;
  compute_->norm_rope(norm, used.data(), rows, heads, turns.data(), rotary, rounded.data(),
                      DType::kBF16);
  for (size_t i = 0; i < y.size(); ++i) EXPECT_EQ(rounded[i], f32_to_bf16(y[i]));
}

TEST_F(ComputeTest, SwigluClampsAndStaysFinite) {
  const size_t rows = 19, n = 33;
  auto x = random_floats(rows * 2 * n, 8, 4);
  const float extremes[] = {1e30f, -1e30f, 90.0f, -90.0f, 7.0f, -7.0f, 0.0f, -60.0f};
  std::copy(std::begin(extremes), std::end(extremes), x.begin());      // gates
  std::copy(std::begin(extremes), std::end(extremes), x.begin() + n);  // ups
  std::vector<float> y(rows * n, NAN);
  compute_->swiglu(x.data(), rows, n, 1.7f, 7.0f, y.data());
  for (size_t row = 0; row < rows; ++row)
    for (size_t c = 0; c < n; ++c) {
      const double gate = std::min(d(x[row * 2 * n + c]), 7.0);
      const double up = std::clamp(d(x[row * 2 * n + n + c]), -7.0, 7.0);
      const double expected = (up + 1) * gate / (1 + std::exp(-d(1.7f) * gate));
      EXPECT_NEAR(y[row * n + c], expected, 1e-5 * std::max(1.0, std::abs(expected)));
    }
}

TEST(RoutingTest, RouteTakesTheBestByBiasedScore) {
  const size_t rows = 40, experts = 6;
  auto logits = random_floats(rows * experts, 9);
  std::fill_n(logits.begin(), experts, 0.25f);  // a row of ties
  std::vector<float> bias = random_floats(experts, 10, 0.3f);
  std::fill_n(bias.begin(), 3, 0.9f);
  const Routing routing = route(logits, bias, 2);
  ASSERT_EQ(routing.begin.size(), experts + 1);
  ASSERT_EQ(routing.rows.size(), rows * 2);
  std::vector<double> weight_of_row(rows);
  for (size_t e = 0; e < experts; ++e)
    for (auto i = static_cast<size_t>(routing.begin[e]);
         i < static_cast<size_t>(routing.begin[e + 1]); ++i) {
      const auto row = static_cast<size_t>(routing.rows[i]);
      weight_of_row[row] += d(routing.weights[i]);
      const auto score = [&](size_t expert) {
        return 1 / (1 + std::exp(-d(logits[row * experts + expert]))) + d(bias[expert]);
      };
      size_t better = 0;
      for (size_t other = 0; other < experts; ++other) better += score(other) > score(e);
      EXPECT_LT(better, 2u);
      if (row == 0) {
        EXPECT_LT(e, 2u);  // the lower of equals
      }
    }
  for (double weight : weight_of_row) EXPECT_NEAR(weight, 1, 1e-6);
}

TEST_F(ComputeTest, GatherAndScatterMoveRows) {
  const size_t dim = 9;
  const auto x = random_floats(5 * dim, 11), base = random_floats(7 * dim, 12);
  const std::vector<int32_t> from{4, 0, 3}, to{6, 1, 2};
  const std::vector<float> weights{0.5f, -2.0f, 0.25f};
  std::vector<float> rows(3 * dim), y = base;
  compute_->gather(x.data(), from, dim, rows.data());
  compute_->scatter_add(rows.data(), to, weights, 3.0f, dim, y.data());
  for (size_t i = 0; i < 3; ++i)
    for (size_t c = 0; c < dim; ++c) {
      const size_t at = static_cast<size_t>(to[i]) * dim + c;
      EXPECT_NEAR(y[at], base[at] + 3 * weights[i] * x[static_cast<size_t>(from[i]) * dim + c],
                  1e-5);
    }
  EXPECT_TRUE(std::equal(y.begin(), y.begin() + dim, base.begin()));  // row 0 is nobody's
}

TEST_F(ComputeTest, CrossEntropyIsExactAndSurvivesExtremes) {
  const size_t rows = 20, vocab = 53;
  auto logits = random_floats(rows * vocab, 13, 5);
  logits[3] = 1e30f;
  logits[vocab + 8] = -std::numeric_limits<float>::infinity();
  std::vector<int32_t> targets(rows);
  for (size_t i = 0; i < rows; ++i) targets[i] = static_cast<int32_t>(i * 7 % vocab);
  targets[0] = 3;
  std::vector<float> nats(rows);
  compute_->cross_entropy(logits.data(), targets, vocab, nats.data());
  for (size_t i = 0; i < rows; ++i) {
    const float* line = logits.data() + i * vocab;
    const double top = d(*std::max_element(line, line + vocab));
    double sum = 0;
    for (size_t c = 0; c < vocab; ++c) sum += std::exp(d(line[c]) - top);
    EXPECT_NEAR(nats[i], std::log(sum) + top - d(line[targets[i]]), 1e-5) << i;
  }
}

}  // namespace
}  // namespace msa::model
