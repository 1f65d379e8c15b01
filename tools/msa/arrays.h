// Memory for tensors, and the views of them that commands need.
#pragma once

#include <functional>
#include <initializer_list>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "msa/msa.h"

namespace msa::cli {

/// A contiguous tensor with memory of its own, 64-byte aligned, contents undefined.
/// Throws std::runtime_error with the sizes when all arrays together exceed the machine's memory.
class Array {
 public:
  Array() = default;
  Array(DType dtype, std::span<const int64_t> shape);
  Array(DType dtype, std::initializer_list<int64_t> shape)
      : Array(dtype, std::span(shape.begin(), shape.size())) {}
  ~Array();
  Array(Array&& other) noexcept { *this = std::move(other); }
  Array& operator=(Array&& other) noexcept;

  const TensorView& view() const { return view_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.data);
  }
  int64_t bytes() const { return bytes_; }

  /// i32 [n] with the given values.
  static Array i32(const std::vector<int32_t>& values);
  /// Workspace of a plan.
  static Array bytes_for(const Plan& plan) {
    return Array(DType::kI8, {std::max<int64_t>(1, plan.workspace_bytes)});
  }
  Workspace workspace() const { return {view_.data, static_cast<size_t>(bytes_)}; }

 private:
  TensorView view_{};
  int64_t bytes_ = 0;
};

/// Rows begin .. begin+count-1 of one axis.
TensorView slice(TensorView view, int axis, int64_t begin, int64_t count);

/// Normally distributed values (sum of four uniforms), a pure function of the seed.
void fill_normal(const TensorView& contiguous, uint64_t seed, Threads& threads);
/// NaN in every f32, bf16 or f16 element, -7 in every i32: what an operator must overwrite.
void poison(const TensorView& contiguous);

/// Seconds of one call.
double seconds_of(const std::function<void()>& call);

struct Quantiles {
  double p10 = 0, median = 0, p90 = 0;
};
Quantiles quantiles(std::vector<double> values);

}  // namespace msa::cli
