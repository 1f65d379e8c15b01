#include "cuda/sm90/prefill/launch.h"

#include <algorithm>
#include <cmath>

#include "cuda/device.h"
#include "cuda/launch.h"
#include "cuda/sm90/prefill/union.cuh"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::prefill {
namespace {

constexpr float kLog2E = 1.44269504088896340736F;

template <int kGroup>
Status run_union(const Plan& plan, const SparseAttentionParams& a, Workspace workspace,
                 cudaStream_t stream) {
  const Problem& problem = plan.problem;
  UnionArgs args{};
  args.batch = device_batch(a.batch, a.q.shape[0], a.k, kBlock);
  args.lists = {a.ids.at<const int32_t>(), a.ids.stride[0], a.ids.stride[1], problem.topk};
  args.out = {a.o.data,        a.lse.given() ? a.lse.at<float>() : nullptr,
              a.o.stride[0],   a.o.stride[1],
              a.lse.stride[0], a.lse.stride[1]};
  args.scale =
      (a.softmax_scale == 0 ? 1 / std::sqrt(static_cast<float>(kDim)) : a.softmax_scale) * kLog2E;
  args.heads_kv = problem.heads_kv;
  args.next_tile = static_cast<int*>(workspace.data);

  CUtensorMap q_map, k_map, v_map;
  MSA_TRY(map_queries("q", a.q, kGroup, 1, &q_map));
  MSA_TRY(map_keys("k", a.k, problem.layout, kBlock, &k_map));
  MSA_TRY(map_keys("v", a.v, problem.layout, kBlock, &v_map));

  const DeviceInfo* device = nullptr;
  MSA_TRY(device_info(problem.device.id, &device));
  const int64_t most_tiles =
      (ceil_div(a.q.shape[0], int64_t{kRows / kGroup}) + args.batch.sequences + 1) *
      problem.heads_kv;
  MSA_TRY(check_cuda(cudaMemsetAsync(args.next_tile, 0, sizeof(int), stream), "sparse_attention"));
  const LaunchShape shape{.grid = static_cast<uint32_t>(std::min<int64_t>(most_tiles, device->sms)),
                          .block = kThreads,
                          .shared_bytes = sizeof(UnionShared<kGroup>)};
  const auto start = [&](auto* kernel) {
    return launch("sparse_attention (union)", kernel, shape, stream, q_map, k_map, v_map, args);
  };
  return a.o.dtype == DType::kF32 ? start(&attend_union<kGroup, float>)
                                  : start(&attend_union<kGroup, __nv_bfloat16>);
}

}  // namespace

bool fits(const Problem& problem) {
  return problem.op == Op::kSparseAttention && problem.dtype == DType::kBF16 &&
         problem.head_dim == kDim && problem.block_size == kBlock && problem.topk <= kMostSlots &&
         (problem.group() == 16 || problem.group() == 8);
}

bool fits(const SparseAttentionParams& a) {
  return a.softmax_scale >= 0 && aligned(a.q) && aligned(a.k) && aligned(a.v) && aligned(a.o);
}

int64_t workspace_bytes(const Problem&, const Limits&) { return 256; }  // the counter of tiles

Status run(const Plan& plan, const SparseAttentionParams& a, Workspace workspace,
           cudaStream_t stream) {
  if (a.q.shape[0] == 0) return {};
  return plan.problem.group() == 16 ? run_union<16>(plan, a, workspace, stream)
                                    : run_union<8>(plan, a, workspace, stream);
}

}  // namespace msa::cuda::sm90::prefill
