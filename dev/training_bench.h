// What the benches of training share: tensors in device memory, lists of blocks, times of steps.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>

#include "core/half.h"
#include "msa/msa.h"

namespace training_bench {

using namespace msa;

constexpr int kTopk = 16;

inline void must(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}
inline void must(const Status& status) {
  if (status.ok()) return;
  std::printf("FAILED: %s\n", status.message().c_str());
  std::exit(1);
}

/// A contiguous tensor in device memory.
template <class T>
TensorView upload(const std::vector<T>& values, DType dtype, std::initializer_list<int64_t> shape) {
  void* data = nullptr;
  must(cudaMalloc(&data, values.size() * sizeof(T)), "cudaMalloc");
  must(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  TensorView view = TensorView::contiguous(data, dtype, shape);
  view.device = {DeviceKind::kCUDA, 0};
  return view;
}
inline TensorView normal(std::initializer_list<int64_t> shape, uint32_t seed) {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  std::vector<uint16_t> some(1 << 20);  // a million numbers, over and over
  std::mt19937 rng(seed);
  std::normal_distribution<float> draw;
  for (uint16_t& x : some) x = f32_to_bf16(draw(rng));
  std::vector<uint16_t> all(static_cast<size_t>(count));
  for (size_t i = 0; i < all.size(); ++i) all[i] = some[(i + i / some.size() * 131) % some.size()];
  return upload(all, DType::kBF16, shape);
}

/// Blocks of the past and the own one, anywhere or (`near`) the last ones.
inline std::vector<int32_t> make_ids(int64_t heads, int64_t tokens, bool near) {
  std::vector<int32_t> ids(static_cast<size_t>(heads * tokens * kTopk), -1);
  std::mt19937 rng(7);
  std::vector<int32_t> list;
  for (int64_t i = 0; i < heads * tokens; ++i) {
    const int32_t own = static_cast<int32_t>(i % tokens / 128);
    const int32_t count = std::min(own + 1, kTopk);
    list.assign(1, own);
    while (static_cast<int32_t>(list.size()) < count) {
      const int32_t block = near || own < kTopk ? own - static_cast<int32_t>(list.size())
                                                : static_cast<int32_t>(rng() % own);
      if (std::find(list.begin(), list.end(), block) == list.end()) list.push_back(block);
    }
    std::sort(list.begin(), list.end());
    std::copy(list.begin(), list.end(), ids.begin() + i * kTopk);
  }
  return ids;
}

/// Median of 10 after 3, in milliseconds.
inline double time_of(const std::function<Status()>& work) {
  std::vector<double> times;
  cudaEvent_t begin, end;
  must(cudaEventCreate(&begin), "event");
  must(cudaEventCreate(&end), "event");
  for (int i = 0; i < 13; ++i) {
    must(cudaEventRecord(begin, nullptr), "record");
    must(work());
    must(cudaEventRecord(end, nullptr), "record");
    must(cudaEventSynchronize(end), "run");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 3) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

}  // namespace training_bench
