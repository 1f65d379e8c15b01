// The CPU device. Loops run over rows in parallel and over channels in the form that compilers
// vectorise: no branch, no library call, sums in lanes. Rows are independent, so results do not
// depend on the number of threads.
#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>
#include <numeric>

#include "core/half.h"
#include "cpu/linear.h"
#include "model/compute.h"

namespace msa::model {
namespace {

constexpr int64_t kRowsPerTask = 16;
constexpr size_t kAlignment = 64;

constexpr float kMinExp = -87.0f, kMaxExp = 88.0f;  // exp stays normal and finite

// By value and without branches, unlike std::clamp: loops over it vectorise.
inline float clamp(float x, float low, float high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// exp(x) within 2e-7 relative for -87 <= x <= 88: x = n ln 2 + r, |r| <= ln 2 / 2, and a polynomial
// for exp(r). Callers clamp in a loop of their own: beside constant bounds, compilers turn the
// arithmetic into branches.
inline float fast_exp(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98756915e-4f;  // minimax coefficients of (exp(r) - 1 - r) / r^2
  p = p * r + 1.39819995e-3f;
  p = p * r + 8.33345188e-3f;
  p = p * r + 4.16657962e-2f;
  p = p * r + 1.66666657e-1f;
  p = p * r + 5.00000012e-1f;
  const float value = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) - std::bit_cast<int32_t>(kRound);
  return value * std::bit_cast<float>((exponent + 127) << 23);
}

constexpr int kLanes = 16;

float sum_of_squares(const float* x, int64_t dim) {
  std::array<float, kLanes> lanes{};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[static_cast<size_t>(l)] += x[i + l] * x[i + l];
  for (; i < dim; ++i) lanes[0] += x[i] * x[i];
  return std::accumulate(lanes.begin(), lanes.end(), 0.0f);
}

// False where the mean square is no finite number.
bool norm_row(const Norm& norm, float* x) {
  const float mean = sum_of_squares(x, norm.dim) / static_cast<float>(norm.dim);
  const float scale = 1.0f / std::sqrt(mean + norm.eps);
  const float* weight = norm.weight.f32();
  for (int64_t i = 0; i < norm.dim; ++i) x[i] = x[i] * scale * (1.0f + weight[i]);
  return std::isfinite(mean);
}

void turn_row(const float* turns, int32_t rotary_dim, float* x) {
  const int32_t half = rotary_dim / 2;
  const float* cosines = turns;
  const float* sines = turns + half;
  for (int32_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[i + half];
    x[i] = a * cosines[i] - b * sines[i];
    x[i + half] = b * cosines[i] + a * sines[i];
  }
}

void convert_row(const float* x, int64_t count, void* y, DType dtype) {
  if (dtype == DType::kF32) {
    std::memcpy(y, x, static_cast<size_t>(count) * sizeof(float));
  } else {
    for (int64_t i = 0; i < count; ++i) store_f32(y, dtype, i, x[i]);
  }
}

void swiglu_row(const float* gate, const float* up, int64_t n, float alpha, float limit, float* y) {
  for (int64_t i = 0; i < n; ++i) y[i] = clamp(-alpha * gate[i], kMinExp, kMaxExp);
  // Above the limit the sigmoid belongs to the limit, as the gate does.
  const float least = -alpha * limit;
  for (int64_t i = 0; i < n; ++i) {
    const float g = gate[i] > limit ? limit : gate[i];
    const float e = y[i] < least ? least : y[i];
    y[i] = (clamp(up[i], -limit, limit) + 1.0f) * g / (1.0f + fast_exp(e));
  }
}

float cross_entropy_row(const float* logits, int64_t vocab, int32_t target) {
  const float top = *std::max_element(logits, logits + vocab);
  std::array<double, kLanes> lanes{};
  int64_t i = 0;
  for (; i + kLanes <= vocab; i += kLanes)
    for (int l = 0; l < kLanes; ++l)
      lanes[static_cast<size_t>(l)] +=
          static_cast<double>(fast_exp(clamp(logits[i + l] - top, kMinExp, 0)));
  for (; i < vocab; ++i)
    lanes[0] += static_cast<double>(fast_exp(clamp(logits[i] - top, kMinExp, 0)));
  const double sum = std::accumulate(lanes.begin(), lanes.end(), 0.0);
  return static_cast<float>(std::log(sum) - static_cast<double>(logits[target] - top));
}

class CpuMatrix final : public Matrix {
 public:
  CpuMatrix(const void* w, DType dtype, int64_t n, int64_t k) : weight(w, dtype, n, k) {}
  int64_t rows() const override { return weight.rows(); }
  int64_t columns() const override { return weight.columns(); }

  cpu::LinearWeight weight;
};

// What bad_row() tells, noted by many threads.
class BadRows {
 public:
  void note(int64_t row) {
    const uint64_t mine = BadRow::key(row, call_);
    uint64_t first = first_;
    while (mine < first && !first_.compare_exchange_weak(first, mine)) {
    }
  }
  void next_call() { ++call_; }
  std::optional<BadRow> take() {
    call_ = 0;
    return BadRow::of(first_.exchange(BadRow::kNone));
  }

 private:
  int64_t call_ = 0;
  std::atomic<uint64_t> first_ = BadRow::kNone;
};

class CpuCompute final : public Compute {
 public:
  explicit CpuCompute(int threads) : team_(threads) {}

  Device device() const override { return {}; }
  Queue queue() override { return {.threads = &team_}; }
  int threads() const override { return team_.count(); }
  // Enough for full matrix tiles and for many queries per key block.
  int64_t chunk_rows() const override { return 2048; }
  Status wait() override { return {}; }

  void* allocate(int64_t bytes) override {
    return ::operator new(static_cast<size_t>(bytes), std::align_val_t{kAlignment}, std::nothrow);
  }
  void release(void* data) override { ::operator delete(data, std::align_val_t{kAlignment}); }

  void copy(void* to, const void* from, int64_t bytes) override {
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }

  std::unique_ptr<Matrix> upload(const void* w, DType dtype, int64_t n, int64_t k) override {
    return std::make_unique<CpuMatrix>(w, dtype, n, k);
  }

  void matmul(const Matrix& w, const float* x, int64_t rows, float* y) override {
    const auto& matrix = static_cast<const CpuMatrix&>(w).weight;
    matrix.multiply(x, matrix.columns(), rows, y, matrix.rows(), team_);
  }

  void embed(const Buffer& table, std::span<const int32_t> ids, int64_t dim, float* y) override {
    for (size_t i = 0; i < ids.size(); ++i)
      std::copy_n(table.f32() + ids[i] * dim, dim, y + static_cast<int64_t>(i) * dim);
  }

  void add_norm(const Norm& norm, float* x, const float* delta, int64_t rows, float* y) override {
    const int64_t dim = norm.dim;
    for_rows(rows, [&](int64_t row) {
      float* to = x + row * dim;
      if (delta != nullptr)
        for (int64_t i = 0; i < dim; ++i) to[i] += delta[row * dim + i];
      std::copy_n(to, dim, y + row * dim);
      if (!norm_row(norm, y + row * dim)) bad_rows_.note(row);
    });
    bad_rows_.next_call();
  }

  void rope_angles(int64_t first, int64_t rows, int32_t rotary_dim, double theta,
                   float* turns) override {
    // Frequency and angle are rounded to f32, as the model was trained.
    const int32_t half = rotary_dim / 2;
    std::vector<float> frequency(static_cast<size_t>(half));
    for (int32_t i = 0; i < half; ++i)
      frequency[static_cast<size_t>(i)] =
          1.0f / static_cast<float>(std::pow(theta, static_cast<double>(2 * i) / rotary_dim));
    for_rows(rows, [&](int64_t row) {
      for (int32_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(first + row) * frequency[static_cast<size_t>(i)];
        turns[row * rotary_dim + i] = std::cos(angle);
        turns[row * rotary_dim + half + i] = std::sin(angle);
      }
    });
  }

  void norm_rope(const Norm& norm, float* x, int64_t rows, int64_t heads, const float* turns,
                 int32_t rotary_dim, void* y, DType dtype) override {
    const int64_t dim = norm.dim;
    for_rows(rows, [&](int64_t row) {
      for (int64_t h = row * heads; h < (row + 1) * heads; ++h) {
        if (!norm_row(norm, x + h * dim)) bad_rows_.note(row);
        turn_row(turns + row * rotary_dim, rotary_dim, x + h * dim);
      }
      const int64_t width = heads * dim;
      convert_row(x + row * width, width, static_cast<std::byte*>(y) + row * width * size_of(dtype),
                  dtype);
    });
    bad_rows_.next_call();
  }

  void convert(const float* x, int64_t count, void* y, DType dtype) override {
    constexpr int64_t kPiece = 4096;
    team_.parallel_for((count + kPiece - 1) / kPiece, [&](int64_t piece, int) {
      const int64_t begin = piece * kPiece;
      convert_row(x + begin, std::min(kPiece, count - begin),
                  static_cast<std::byte*>(y) + begin * size_of(dtype), dtype);
    });
  }

  void swiglu(const float* x, int64_t rows, int64_t n, float alpha, float limit,
              float* y) override {
    for_rows(rows, [&](int64_t row) {
      const float* gate = x + row * 2 * n;
      swiglu_row(gate, gate + n, n, alpha, limit, y + row * n);
    });
  }

  void gather(const float* x, std::span<const int32_t> rows, int64_t dim, float* y) override {
    for_rows(static_cast<int64_t>(rows.size()), [&](int64_t i) {
      std::copy_n(x + rows[static_cast<size_t>(i)] * dim, dim, y + i * dim);
    });
  }

  void scatter_add(const float* x, std::span<const int32_t> rows, std::span<const float> weights,
                   float scale, int64_t dim, float* y) override {
    for_rows(static_cast<int64_t>(rows.size()), [&](int64_t i) {
      const float weight = scale * weights[static_cast<size_t>(i)];
      float* to = y + rows[static_cast<size_t>(i)] * dim;
      for (int64_t c = 0; c < dim; ++c) to[c] += weight * x[i * dim + c];
    });
  }

  void cross_entropy(const float* logits, std::span<const int32_t> targets, int64_t vocab,
                     float* nats) override {
    for_rows(static_cast<int64_t>(targets.size()), [&](int64_t row) {
      nats[row] = cross_entropy_row(logits + row * vocab, vocab, targets[static_cast<size_t>(row)]);
    });
  }

  std::optional<BadRow> bad_row() override { return bad_rows_.take(); }

 private:
  template <class Body>
  void for_rows(int64_t rows, const Body& body) {
    team_.parallel_for((rows + kRowsPerTask - 1) / kRowsPerTask, [&](int64_t task, int) {
      const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
      for (int64_t row = task * kRowsPerTask; row < end; ++row) body(row);
    });
  }

  Threads team_;
  BadRows bad_rows_;
};

}  // namespace

std::unique_ptr<Compute> make_cpu_compute(int threads) {
  return std::make_unique<CpuCompute>(threads);
}

}  // namespace msa::model
