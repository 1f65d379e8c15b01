// The index branch in training on a bare Hopper machine, step by step. `msa check` judges its
// results; `msa bench kl_backward` times the whole.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//     -o kl_bench dev/kl_bench.cu src/cuda/device.cc src/cuda/tensor_map.cc
//     src/cuda/smxx/block_lists.cu libmsa.a
//   kl_bench [TOKENS [HEADS_KV [GROUP [uniform | near | full]]]]
//
// Lists: `uniform` blocks of the past and the own one, or the last 16 (`near`); `full`: no lists,
// where a step is that of the first round, but "all" has all. One sequence, K 16.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/sm90/kl/launch.cu"  // its steps are nobody else's business
#include "training_bench.h"

namespace {

using namespace training_bench;
namespace kl = msa::cuda::sm90::kl;

struct Bench {
  int64_t tokens;
  int32_t heads_kv, group;
  bool full;
  Problem problem;
  Limits limits;
  Batch batch;
  TensorView ids{};
  double pairs = 0;  // (query, block) of a step, all heads

  Bench(int64_t tokens_, int32_t heads_kv_, int32_t group_, const char* kind)
      : tokens(tokens_),
        heads_kv(heads_kv_),
        group(group_),
        full(std::strcmp(kind, "full") == 0),
        problem{.dtype = DType::kBF16,
                .heads_q = heads_kv_ * group_,
                .heads_kv = heads_kv_,
                .topk = kTopk,
                .device = {DeviceKind::kCUDA, 0}},
        limits{.max_batch = 1, .max_tokens = tokens_, .max_q_len = tokens_, .max_kv_len = tokens_} {
    const auto lengths = std::vector<int32_t>{0, static_cast<int32_t>(tokens)};
    batch.cu_seqlens_q = upload(lengths, DType::kI32, {2});
    batch.cu_seqlens_k = upload(lengths, DType::kI32, {2});
    for (int64_t t = 0; t < tokens; ++t)
      pairs += static_cast<double>(heads_kv * std::min<int64_t>(t / 128 + 1, kTopk));
    if (!full)
      ids = upload(make_ids(heads_kv, tokens, std::strcmp(kind, "near") == 0), DType::kI32,
                   {heads_kv, tokens, kTopk});
  }
  /// About the LSE of so many keys with logits of variance 1.
  TensorView lse(int64_t heads) const {
    const double keys = full ? static_cast<double>(tokens) / 2 : 128.0 * kTopk;
    return upload(std::vector<float>(static_cast<size_t>(tokens * heads),
                                     static_cast<float>(std::log(keys) + 0.5)),
                  DType::kF32, {tokens, heads});
  }

  template <class Params>
  void start(Op op, const Params& a, Plan* plan, Workspace* workspace, kl::Call* call) {
    problem.op = op;
    *plan = {nullptr, problem, limits, kl::workspace_bytes(problem, limits)};
    workspace->bytes = static_cast<size_t>(plan->workspace_bytes);
    must(cudaMalloc(&workspace->data, workspace->bytes), "workspace");
    must(kl::make_call(*plan, a, *workspace, call, nullptr));
    must(kl::run(*plan, a, *workspace, nullptr));
    must(cudaDeviceSynchronize(), "run");
    std::printf("%s: %.2f GB of workspace, tasks of at most %lld\n", name_of(op),
                static_cast<double>(workspace->bytes) * 1e-9,
                static_cast<long long>(call->parts.tasks.task_queries));
  }
  void report(const char* step, double flops, const std::function<Status()>& work) const {
    const double ms = time_of(work);
    std::printf("  %-8s %8.3f ms", step, ms);
    if (flops > 0) std::printf("  %6.1f TFLOP/s of the teacher", flops / ms * 1e-9);
    std::printf("\n");
  }

  void index_lse() {
    const IndexLseParams a{.q_idx = normal({tokens, heads_kv, 128}, 3),
                           .k_idx = normal({tokens, 128}, 4),
                           .ids = ids,
                           .batch = batch,
                           .lse = lse(heads_kv)};
    Plan plan;
    Workspace workspace;
    kl::Call call{};
    start(Op::kIndexLse, a, &plan, &workspace, &call);
    report("all", 0, [&] { return kl::run(plan, a, workspace, nullptr); });
    must(cudaFree(workspace.data), "free");
  }

  void kl_of(Op op) {
    const int64_t heads_q = problem.heads_q;
    KlParams a{.q = normal({tokens, heads_q, 128}, 1),
               .k = normal({tokens, heads_kv, 128}, 2),
               .lse = lse(heads_q),
               .q_idx = normal({tokens, heads_kv, 128}, 3),
               .k_idx = normal({tokens, 128}, 4),
               .index_lse = lse(heads_kv),
               .ids = ids,
               .batch = batch};
    const bool gradients = op == Op::kKlBackward;
    if (gradients) {
      a.dq_idx = normal({tokens, heads_kv, 128}, 5);
      a.dk_idx = normal({tokens, 128}, 6);
    } else {
      a.kl = lse(heads_kv);
    }
    Plan plan;
    Workspace workspace;
    kl::Call call{};
    start(op, a, &plan, &workspace, &call);
    const double flops = pairs * group * 128 * 128 * 2;
    if (!full) report("lists", 0, [&] { return kl::make_lists(plan, a, &call, nullptr); });
    report("tasks", 0, [&] { return kl::launch_tasks("tasks", call, 0, nullptr); });
    report("blocks", flops, [&] {  // with the tasks, whose counter it uses up
      MSA_TRY(kl::launch_tasks("tasks", call, 0, nullptr));
      return gradients ? kl::launch_blocks<true>(call, a, group, nullptr)
                       : kl::launch_blocks<false>(call, a, group, nullptr);
    });
    report("merge", 0, [&] { return kl::launch_merge(call, a, 0, nullptr); });
    if (gradients) report("keys", 0, [&] { return kl::launch_reduce(call, a, 0, nullptr); });
    report("all", full ? 0 : flops, [&] { return kl::run(plan, a, workspace, nullptr); });
    must(cudaFree(workspace.data), "free");
  }
};

}  // namespace

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 32768;
  const int heads = argc > 2 ? std::atoi(argv[2]) : 4, group = argc > 3 ? std::atoi(argv[3]) : 16;
  const char* kind = argc > 4 ? argv[4] : "uniform";
  Bench bench(tokens, heads, group, kind);
  std::printf("%lld tokens, %d/%d heads, %s\n", static_cast<long long>(tokens), heads * group,
              heads, kind);
  bench.index_lse();
  bench.kl_of(Op::kKlBackward);
  bench.kl_of(Op::kKlLoss);
}
