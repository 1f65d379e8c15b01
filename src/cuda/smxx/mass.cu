// Attention mass of blocks: a CTA per query token and KV head, walking blocks.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tile/huge_lse.cuh"

namespace msa::cuda::plain {
namespace {

struct Mass {
  DeviceBatch batch;
  Tensor q;  ///< [T,Hq,D]
  KeyTensor k;
  Tensor lse;   ///< f32 [T,Hq]
  Tensor mass;  ///< f32 [Hkv,T,columns]
  int group, dim, columns;
  float scale;
};

__global__ void __launch_bounds__(128) mass_kernel(Mass a) {
  const int kv_head = static_cast<int>(blockIdx.y), t = static_cast<int>(blockIdx.x);
  const int head = kv_head * a.group;
  const int pitch = pitch_of(a.dim), staged = warps() * kWarpRows;
  float* q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [staged][pitch]
  float* keys = q + staged * pitch;                          // [32][pitch]
  float* warp_mass = keys + kKeys * pitch;                   // [warps]

  const Query query = query_at(a.batch, t);
  for (int j = static_cast<int>(blockIdx.z); j < a.columns; j += static_cast<int>(gridDim.z)) {
    float sum = 0;  // of this lane's keys, over this warp's heads
    const int64_t begin = int64_t{j} * a.batch.block_size;
    const int64_t end = min(begin + a.batch.block_size, int64_t{query.visible});
    for (int first_row = 0; begin < end && first_row < a.group; first_row += staged) {
      const int rows = min(a.group - first_row, staged);
      __syncthreads();
      stage(q, staged, a.dim, a.q.data, a.q.dtype, [&](int row) {
        return row < rows ? a.q.offset(t, head + first_row + row) : int64_t{-1};
      });
      for (int64_t s = begin; s < end; s += kKeys) {
        const int64_t token = s + lane();
        Place place;
        if (token < end) place = place_of(a.batch, query.s, static_cast<int>(token));
        __syncthreads();
        stage_keys(keys, a.dim, a.k, kv_head, place);
        __syncthreads();
        float logit[kWarpRows];
        products(q + warp() * kWarpRows * pitch, keys, a.dim, logit);
        for (int i = 0; i < kWarpRows; ++i) {
          const int row = warp() * kWarpRows + i;
          if (place.row >= 0 && row < rows)
            sum += expf(log_probability(logit[i], a.scale,
                                        a.lse.at<const float>(t, head + first_row + row)));
        }
      }
    }
    sum = warp_sum(sum);
    __syncthreads();
    if (lane() == 0) warp_mass[warp()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0;
      for (int w = 0; w < warps(); ++w) total += warp_mass[w];
      a.mass.at<float>(kv_head, t, j) = total / static_cast<float>(a.group);
    }
  }
}

}  // namespace

template <>
Status run(const Plan& plan, const BlockMassParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const RowCut cut(p.group());
  const int64_t tokens = a.q.shape[0], columns = a.mass.shape[2];
  const LaunchShape shape{
      .grid = dim3(columns > 0 ? static_cast<uint32_t>(tokens) : 0,
                   static_cast<uint32_t>(p.heads_kv), walks(tokens * p.heads_kv, columns)),
      .block = dim3(static_cast<uint32_t>(32 * cut.warps)),
      .shared_bytes = static_cast<uint32_t>(
          ((cut.warps * kWarpRows + kKeys) * pitch_of(p.head_dim) + cut.warps) * 4)};
  return launch("block_mass", mass_kernel, shape, stream,
                Mass{.batch = device_batch(a.batch, tokens, a.k, p.block_size),
                     .q = tensor(a.q),
                     .k = key_tensor(a.k, p.layout),
                     .lse = tensor(a.lse),
                     .mass = tensor(a.mass),
                     .group = p.group(),
                     .dim = p.head_dim,
                     .columns = static_cast<int>(columns),
                     .scale = softmax_scale(a.softmax_scale, p.head_dim)});
}

}  // namespace msa::cuda::plain
