// Attention backward on a bare Hopper machine, step by step. `msa check` judges its results;
// `msa bench sparse_attention_backward` times the whole.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//     -o backward_bench dev/backward_bench.cu src/cuda/device.cc src/cuda/tensor_map.cc
//     src/cuda/sm90/backward/query_gradient.cu src/cuda/smxx/block_lists.cu libmsa.a
//   backward_bench [TOKENS [HEADS_KV [GROUP [uniform | near | dense]]]]
//
// Lists: `uniform` blocks of the past and the own one, or the last 16 (`near`). One sequence, K 16.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/sm90/backward/launch.cu"  // its steps are nobody else's business
#include "training_bench.h"

namespace {

using namespace training_bench;
namespace backward = msa::cuda::sm90::backward;

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
