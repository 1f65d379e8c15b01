#include "cuda/sm90/dense/family.h"

#include <algorithm>

#include "core/op_table.h"
#include "cuda/device.h"
#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/dense/kernel.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::dense {
namespace {

/// One consumer is enough when a tile of 64 rows holds all new tokens of a sequence.
int consumers(const Problem& problem, const Limits& limits) {
  return limits.max_seqlen_q * problem.group() <= kTileRows ? 1 : 2;
}

/// Whole tiles keep an SM busy only if every SM gets several; and tiles of a few tokens over a long
/// prefix differ too much.
bool splits(const Problem& problem, const Limits& limits, int64_t tokens) {
  constexpr int64_t kTilesPerCta = 4;
  const int64_t rows = tokens * problem.heads_q;
  return limits.max_seqlen_q <= kDecodeTokens || rows < kTilesPerCta * kMaxCtas * 2 * kTileRows;
}

/// Parts of the workspace: [2*CTAs, rows, D] outputs, [2*CTAs, rows] softmaxes, one counter.
constexpr int64_t kPartRows = int64_t{2} * kMaxCtas * 2 * kTileRows;

template <int kConsumers>
Status launch_attend(const Maps& maps, const Args& args, int ctas, cudaStream_t stream) {
  MSA_TRY(launch("dense_attention", attend<kConsumers>,
                 {.grid = static_cast<uint32_t>(ctas),
                  .block = 128 * (kConsumers + 1),
                  .shared_bytes = sizeof(Shared<kConsumers>)},
                 stream, maps, args));
  if (!args.split) return {};
  const int64_t rows = int64_t{args.batch.tokens} * args.heads_kv * args.group;
  return launch("dense_attention merge", merge_parts,
                {.grid = static_cast<uint32_t>(ceil_div(rows, 4)), .block = 128, .overlap = true},
                stream, args, ctas, kTileRows * kConsumers);
}

}  // namespace

int64_t workspace_bytes(const Problem&, const Limits&) {
  return kPartRows * (kDim * 4 + int64_t{sizeof(PartSoftmax)}) + 256;
}

Status run(const Plan& plan, const DenseAttentionParams& params, Workspace workspace,
           cudaStream_t stream) {
  const Problem& problem = plan.problem;
  const int64_t tokens = params.q.shape[0];
  if (tokens == 0) return {};
  const DeviceInfo* device = nullptr;
  MSA_TRY(device_info(problem.device.id, &device));
  const int count = consumers(problem, plan.limits);

  Args args{};
  args.batch = device_batch(params.batch, tokens, params.k, kBlock);
  args.heads_kv = problem.heads_kv;
  args.group = problem.group();
  args.tile_tokens = count * kTileRows / args.group;
  args.split = splits(problem, plan.limits, tokens);
  args.scale = softmax_scale(params.softmax_scale, kDim) * kLog2E;
  if (params.o.dtype == DType::kBF16)
    args.o = rows<__nv_bfloat16>(params.o);
  else
    args.o_wide = rows<float>(params.o);
  args.lse = rows<float>(params.lse);
  args.block_max = rows<float>(params.block_max, 1);
  args.block_columns = params.block_max.given() ? static_cast<int>(params.block_max.shape[2]) : 0;
  args.o_parts = static_cast<float*>(workspace.data);
  args.softmax_parts = reinterpret_cast<PartSoftmax*>(args.o_parts + kPartRows * kDim);
  args.next_tile = reinterpret_cast<int*>(args.softmax_parts + kPartRows);

  Maps maps;
  MSA_TRY(map_queries("q", params.q, static_cast<uint32_t>(args.group),
                      static_cast<uint32_t>(args.tile_tokens), &maps.q));
  MSA_TRY(map_keys("k", params.k, problem.layout, kBlock, &maps.k));
  MSA_TRY(map_keys("v", params.v, problem.layout, kBlock, &maps.v));
  if (!args.split)
    MSA_TRY(check_cuda(cudaMemsetAsync(args.next_tile, 0, sizeof(int), stream), "dense_attention"));
  const int ctas = std::min(device->sms, kMaxCtas);
  return count == 1 ? launch_attend<1>(maps, args, ctas, stream)
                    : launch_attend<2>(maps, args, ctas, stream);
}

std::span<const Kernel> kernels() {
  static constexpr Kernel kAll[] = {tuned<DenseAttentionParams, fits, takes, run>(
      Op::kDenseAttention, "sm90/dense", workspace_bytes)};
  return kAll;
}

}  // namespace msa::cuda::sm90::dense
