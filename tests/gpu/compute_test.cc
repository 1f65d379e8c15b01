// The model's CUDA device: numbers that end are noted and kept, as on the CPU.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "model/compute.h"
#include "msa/backend.h"

namespace msa::model {
namespace {

class CudaComputeTest : public testing::Test {
 protected:
  void SetUp() override {
    const Status usable = find_backend("cuda")->usable();
    if (!usable.ok()) GTEST_SKIP() << "skipped: " << usable.message();
    ASSERT_EQ(make_cuda_compute(DType::kF32, &compute_).message(), "");
  }

  Buffer on_device(const std::vector<float>& values) {
    Buffer buffer;
    EXPECT_EQ(Buffer::create(*compute_, values, &buffer).message(), "");
    return buffer;
  }

  std::unique_ptr<Compute> compute_;
};

TEST_F(CudaComputeTest, NormsNoteRowsThatAreNoNumbers) {
  constexpr int64_t kRows = 50, kDim = 256;
  Norm norm{.weight = on_device(std::vector<float>(kDim)), .dim = kDim, .eps = 1e-6f};
  const Buffer y = on_device(std::vector<float>(kRows * kDim));
  const Buffer turns = on_device(std::vector<float>(kRows * 2, 1.0f));
  const auto with = [&](std::initializer_list<std::pair<int64_t, float>> changes) {
    std::vector<float> x(kRows * kDim, 1.0f);
    for (const auto& [row, value] : changes) x[static_cast<size_t>(row * kDim + 200)] = value;
    return on_device(x);
  };
  const auto add_norm = [&](std::initializer_list<std::pair<int64_t, float>> changes) {
    const Buffer x = with(changes);
    compute_->add_norm(norm, x.f32(), nullptr, kRows, y.f32());
    EXPECT_EQ(compute_->wait().message(), "");
  };
  const auto norm_rope = [&](int64_t row, float value) {  // two heads in a row
    const Buffer x = with({{row, value}});
    compute_->norm_rope(norm, x.f32(), kRows / 2, 2, turns.f32(), 2, y.data(), DType::kF32);
    EXPECT_EQ(compute_->wait().message(), "");
  };
  const auto expect = [&](int64_t row, int64_t call) {
    const std::optional<BadRow> bad = compute_->bad_row();
    ASSERT_TRUE(bad.has_value());
    EXPECT_EQ(bad->row, row);
    EXPECT_EQ(bad->call, call);
    EXPECT_FALSE(compute_->bad_row().has_value());
  };
  add_norm({{3, 1e18f}});
  EXPECT_FALSE(compute_->bad_row().has_value());
  add_norm({{40, NAN}, {31, INFINITY}, {49, -INFINITY}});
  expect(31, 0);
  add_norm({});
  norm_rope(37, NAN);       // row 18
  add_norm({{18, NAN}});    // later
  add_norm({{20, 1e20f}});  // its square is infinity
  expect(18, 1);
}

TEST_F(CudaComputeTest, SwigluKeepsNan) {
  const Buffer x = on_device({NAN, 1.0f, 1.0f, 2.0f, NAN, -9.0f});  // gates, then ups
  const Buffer y = on_device(std::vector<float>(3));
  compute_->swiglu(x.f32(), 1, 3, 1.0f, 7.0f, y.f32());
  std::vector<float> values(3);
  compute_->copy(values.data(), y.data(), sizeof(float) * 3);
  EXPECT_TRUE(std::isnan(values[0]));
  EXPECT_TRUE(std::isnan(values[1]));
  EXPECT_NEAR(values[2], -6.0f / (1.0f + std::exp(-1.0f)), 1e-5f);
}

}  // namespace
}  // namespace msa::model
