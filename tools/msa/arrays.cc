#include "msa/arrays.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>

#include "core/half.h"

namespace msa::cli {
namespace {

std::atomic<int64_t> allocated{0};

int64_t machine_memory() { return int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE); }

}  // namespace

Array::Array(DType dtype, std::span<const int64_t> shape) {
  double size = static_cast<double>(size_of(dtype));
  for (int64_t extent : shape) size *= static_cast<double>(extent);
  const double limit = static_cast<double>(machine_memory());
  if (static_cast<double>(allocated) + size > limit)
    throw std::runtime_error(
        fmt::format("this needs more than {:.1f} GiB of memory, the machine has {:.1f} GiB",
                    (static_cast<double>(allocated) + size) / (1 << 30), limit / (1 << 30)));
  bytes_ = (static_cast<int64_t>(size) + 63) / 64 * 64;
  view_.data = std::aligned_alloc(64, static_cast<size_t>(std::max<int64_t>(bytes_, 64)));
  if (view_.data == nullptr) throw std::bad_alloc();
  allocated += bytes_;
  view_.dtype = dtype;
  int64_t stride = 1;
  view_.rank = static_cast<int32_t>(shape.size());
  for (size_t axis = shape.size(); axis-- > 0; stride *= shape[axis]) {
    view_.shape[axis] = shape[axis];
    view_.stride[axis] = stride;
  }
}

Array::~Array() {
  allocated -= bytes_;
  std::free(view_.data);
}

Array& Array::operator=(Array&& other) noexcept {
  std::swap(view_, other.view_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Array Array::i32(const std::vector<int32_t>& values) {
  Array array(DType::kI32, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), array.data<int32_t>());
  return array;
}

TensorView slice(TensorView view, int axis, int64_t begin, int64_t count) {
  const size_t a = static_cast<size_t>(axis);
  view.data = static_cast<std::byte*>(view.data) + begin * view.stride[a] * size_of(view.dtype);
  view.shape[a] = count;
  return view;
}

void fill_normal(const TensorView& view, uint64_t seed, Threads& threads) {
  constexpr int64_t kChunk = 1 << 14;
  const int64_t count = view.numel();
  threads.parallel_for((count + kChunk - 1) / kChunk, [&](int64_t chunk, int) {
    uint64_t state = (seed + static_cast<uint64_t>(chunk) + 1) * 0x9e3779b97f4a7c15ull;
    for (int64_t i = chunk * kChunk; i < std::min(count, (chunk + 1) * kChunk); ++i) {
      state += 0x9e3779b97f4a7c15ull;  // splitmix64
      uint64_t bits = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9ull;
      bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
      bits ^= bits >> 31;
      uint64_t sum = 0;
      for (int shift = 0; shift < 64; shift += 16) sum += (bits >> shift) & 0xffff;
      constexpr float kMean = 2 * 65535.0f;
      constexpr float kDeviation = 65536 * 0.57735027f;  // sqrt(4 * 1/12)
      store_f32(view.data, view.dtype, i, (static_cast<float>(sum) - kMean) / kDeviation);
    }
  });
}

void poison(const TensorView& view) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int64_t i = 0; i < view.numel(); ++i) {
    if (view.dtype == DType::kI32)
      static_cast<int32_t*>(view.data)[i] = -7;
    else
      store_f32(view.data, view.dtype, i, nan);
  }
}

double seconds_of(const std::function<void()>& call) {
  const auto start = std::chrono::steady_clock::now();
  call();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

Quantiles quantiles(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double fraction) {  // linear interpolation between neighbours
    const double rank = fraction * static_cast<double>(values.size() - 1);
    const size_t low = static_cast<size_t>(rank);
    const size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (rank - std::floor(rank)) * (values[high] - values[low]);
  };
  return {at(0.1), at(0.5), at(0.9)};
}

}  // namespace msa::cli
