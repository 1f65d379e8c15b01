// Attention backward on a bare Hopper machine, step by step. `msa check` judges its results;
// `msa bench sparse_attention_backward` times the whole.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//     -o backward_bench dev/backward_bench.cu src/cuda/device.cc src/cuda/tensor_map.cc
//     src/cuda/sm90/backward/query_gradient.cu src/cuda/smxx/block_lists.cu libmsa.a
//   backward_bench [TOKENS [HEADS_KV [GROUP [uniform | near | dense]]]]
//
// Lists: `uniform` blocks of the past and the own one, or the last 16 (`near`). One sequence, K 16.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "core/half.h"
#include "cuda/sm90/backward/launch.cu"  // its steps are nobody else's business

namespace {

using namespace msa;
namespace backward = msa::cuda::sm90::backward;

constexpr int kTopk = 16;

void must(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}
void must(const Status& status) {
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
TensorView normal(std::initializer_list<int64_t> shape, uint32_t seed) {
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

std::vector<int32_t> make_ids(int64_t heads, int64_t tokens, bool near) {
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
double time_of(const std::function<Status()>& work) {
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

template <int kGroup>
void time_steps(int64_t tokens, int32_t heads_kv, const char* kind) {
  const bool dense = std::strcmp(kind, "dense") == 0;
  const int64_t heads_q = int64_t{heads_kv} * kGroup;
  Problem problem{.op = dense ? Op::kDenseAttentionBackward : Op::kSparseAttentionBackward,
                  .dtype = DType::kBF16,
                  .heads_q = static_cast<int32_t>(heads_q),
                  .heads_kv = heads_kv,
                  .topk = kTopk,
                  .device = {DeviceKind::kCUDA, 0}};
  const Limits limits{
      .max_batch = 1, .max_tokens = tokens, .max_q_len = tokens, .max_kv_len = tokens};
  const auto lengths = std::vector<int32_t>{0, static_cast<int32_t>(tokens)};
  AttentionBackwardParams a{.q = normal({tokens, heads_q, 128}, 1),
                            .k = normal({tokens, heads_kv, 128}, 2),
                            .v = normal({tokens, heads_kv, 128}, 3),
                            .o = normal({tokens, heads_q, 128}, 4),
                            .d_o = normal({tokens, heads_q, 128}, 5)};
  // About what so many keys with logits of variance 1 have.
  const double keys = dense ? static_cast<double>(tokens) / 2 : 128.0 * kTopk;
  a.lse = upload(std::vector<float>(static_cast<size_t>(tokens * heads_q),
                                    static_cast<float>(std::log(keys) + 0.5)),
                 DType::kF32, {tokens, heads_q});
  a.batch.cu_seqlens_q = upload(lengths, DType::kI32, {2});
  a.batch.cu_seqlens_k = upload(lengths, DType::kI32, {2});
  double pairs = 0;  // (query, block), all heads
  if (dense) {
    for (int64_t t = 0; t < tokens; ++t) pairs += static_cast<double>(heads_kv * (t / 128 + 1));
  } else {
    const std::vector<int32_t> ids = make_ids(heads_kv, tokens, std::strcmp(kind, "near") == 0);
    for (int32_t id : ids) pairs += id >= 0 ? 1 : 0;
    a.ids = upload(ids, DType::kI32, {heads_kv, tokens, kTopk});
  }
  a.dq = normal({tokens, heads_q, 128}, 6);
  a.dk = normal({tokens, heads_kv, 128}, 7);
  a.dv = normal({tokens, heads_kv, 128}, 8);

  const Plan plan{nullptr, problem, limits, backward::workspace_bytes(problem, limits)};
  Workspace workspace{nullptr, static_cast<size_t>(plan.workspace_bytes)};
  must(cudaMalloc(&workspace.data, workspace.bytes), "workspace");
  backward::Call call{};
  must(backward::make_call(plan, a, workspace, &call));
  must(backward::run(plan, a, workspace, nullptr));
  must(cudaDeviceSynchronize(), "run");

  int32_t tasks = 0;
  must(cudaMemcpy(&tasks, call.tasks.count, 4, cudaMemcpyDeviceToHost), "count");
  std::printf("%lld tokens, %d/%lld heads, %s: %.2f GB of workspace, %d tasks of at most %d\n",
              static_cast<long long>(tokens), static_cast<int>(heads_q),
              static_cast<long long>(heads_kv), kind,
              static_cast<double>(plan.workspace_bytes) * 1e-9, tasks, call.tasks.task_queries);
  const double flops = pairs * kGroup * 128 * 128 * 2;  // of one product
  const auto report = [&](const char* step, double products, const std::function<Status()>& work) {
    const double ms = time_of(work);
    std::printf("  %-8s %8.3f ms", step, ms);
    if (products > 0) std::printf("  %6.1f TFLOP/s useful", products * flops / ms * 1e-9);
    std::printf("\n");
  };
  report("lists", 0, [&] { return backward::make_lists(plan, a, &call, nullptr); });
  report("delta", 0,
         [&] { return backward::launch_prepare<__nv_bfloat16>(plan, a, call, nullptr); });
  report("tasks", 0, [&] { return backward::launch_tasks(plan, call, nullptr); });
  report("keys", 4, [&] {  // with the tasks, whose counter it uses up
    MSA_TRY(backward::launch_tasks(plan, call, nullptr));
    return backward::launch_key_gradient<kGroup>(plan, call, nullptr);
  });
  report("sum dk", 0, [&] {
    return backward::launch_reduce(call, a.dk, call.layout.dk_parts, call.scale, nullptr);
  });
  report("queries", 3,
         [&] { return backward::run_query_gradient<kGroup>(plan, a, call, nullptr); });
  report("all", 5, [&] { return backward::run(plan, a, workspace, nullptr); });
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 32768;
  const int heads = argc > 2 ? std::atoi(argv[2]) : 4, group = argc > 3 ? std::atoi(argv[3]) : 16;
  const char* kind = argc > 4 ? argv[4] : "uniform";
  if (group == 16)
    time_steps<16>(tokens, heads, kind);
  else
    time_steps<8>(tokens, heads, kind);
}
