// Small tensors for tests, and one way to run an operator on them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string_view>
#include <vector>

#include "msa/msa.h"

namespace msa {

/// Tensors of one call, freed together.
class Tensors {
 public:
  TensorView make(DType dtype, std::initializer_list<int64_t> shape) {
    int64_t elements = 1;
    for (int64_t extent : shape) elements *= extent;
    memory_.emplace_back(static_cast<size_t>(elements) / 2 + 1, 0.25);
    return TensorView::contiguous(memory_.back().data(), dtype, shape);
  }
  TensorView floats(std::initializer_list<int64_t> shape, const std::vector<float>& values) {
    const TensorView view = make(DType::kF32, shape);
    std::copy(values.begin(), values.end(), view.at<float>());
    return view;
  }
  TensorView ints(std::initializer_list<int64_t> shape, const std::vector<int32_t>& values) {
    const TensorView view = make(DType::kI32, shape);
    std::copy(values.begin(), values.end(), view.at<int32_t>());
    return view;
  }
  TensorView ints(const std::vector<int32_t>& values) {
    return ints({static_cast<int64_t>(values.size())}, values);
  }

 private:
  std::vector<std::vector<double>> memory_;
};

template <class T>
std::vector<T> values_of(const TensorView& view) {  // of a contiguous view
  return {view.at<T>(), view.at<T>() + view.numel()};
}

/// Runs a planned operator with a workspace of exactly its size.
template <class Params>
Status call(const Plan& plan, const Params& params, Threads* threads = nullptr) {
  std::vector<double> memory(static_cast<size_t>(plan.workspace_bytes) / 8 + 8);
  void* start = memory.data();
  size_t space = memory.size() * 8;
  std::align(64, 1, start, space);
  return run(plan, params, {start, static_cast<size_t>(plan.workspace_bytes)},
             {.threads = threads});
}

/// Plans and runs.
template <class Params>
Status call(const Problem& problem, const Limits& limits, const Params& params,
            std::string_view backend = "reference", Threads* threads = nullptr) {
  Plan plan;
  MSA_TRY(msa::plan(problem, limits, &plan, backend));
  return call(plan, params, threads);
}

}  // namespace msa
