// A CTA per query token and chunk of its heads, walking blocks; several CTAs share the walk when
// there are few tokens.
#include "cuda/smxx/scores.h"

#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"

namespace msa::cuda::plain {
namespace {

__global__ void __launch_bounds__(128) block_scores_kernel(BlockScores a) {
  const auto [key_head, head, rows] = head_chunk(a.group);
  const int t = static_cast<int>(blockIdx.x);
  const int pitch = pitch_of(a.dim);
  float* q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [4*warps][pitch]
  float* keys = q + warps() * kWarpRows * pitch;             // [32][pitch]

  const Query query = query_at(a.batch, a.first + t);
  stage(q, warps() * kWarpRows, a.dim, a.q.data, a.q.dtype,
        [&](int row) { return row < rows ? a.q.offset(a.first + t, head + row) : int64_t{-1}; });

  for (int j = static_cast<int>(blockIdx.z); j < a.columns; j += static_cast<int>(gridDim.z)) {
    float best[kWarpRows];
    for (float& score : best) score = -infinity();
    const int64_t begin = int64_t{j} * a.batch.block_size;
    const int64_t end = min(begin + a.batch.block_size, int64_t{query.visible});
    for (int64_t s = begin; s < end; s += kKeys) {
      const int64_t token = s + lane();
      Place place;
      if (token < end) place = place_of(a.batch, query.s, static_cast<int>(token));
      __syncthreads();
      stage_keys(keys, a.dim, a.keys, key_head, place);
      __syncthreads();
      float score[kWarpRows];
      products(q + warp() * kWarpRows * pitch, keys, a.dim, score);
      for (int i = 0; i < kWarpRows; ++i)
        if (place.row >= 0 && score[i] > best[i]) best[i] = score[i];  // never true for NaN
    }
    for (int i = 0; i < kWarpRows; ++i) {
      const float most = warp_max(best[i]);
      const int row = warp() * kWarpRows + i;
      if (lane() == 0 && row < rows) a.scores.at<float>(head + row, t, j) = most;
    }
  }
}

}  // namespace

Status block_scores(const BlockScores& a, cudaStream_t stream) {
  const RowCut cut(a.group);
  const auto tokens = static_cast<uint32_t>(a.tokens);
  const auto heads = static_cast<uint32_t>(a.heads / a.group * cut.chunks);
  const LaunchShape shape{
      .grid = dim3(a.columns > 0 ? tokens : 0, heads, walks(int64_t{tokens} * heads, a.columns)),
      .block = dim3(static_cast<uint32_t>(32 * cut.warps)),
      .shared_bytes = static_cast<uint32_t>((cut.warps * kWarpRows + kKeys) * pitch_of(a.dim) * 4)};
  return launch("block_scores", block_scores_kernel, shape, stream, a);
}

template <>
Status run(const Plan& plan, const IndexScoresParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  return block_scores({.batch = device_batch(a.batch, a.q_idx.shape[0], a.k_idx, p.block_size),
                       .q = tensor(a.q_idx),
                       .keys = key_tensor(a.k_idx, p.layout),
                       .scores = tensor(a.scores),
                       .heads = p.heads_kv,
                       .group = p.heads_kv,
                       .dim = p.index_dim,
                       .first = 0,
                       .tokens = static_cast<int>(a.q_idx.shape[0]),
                       .columns = static_cast<int>(a.scores.shape[2])},
                      stream);
}

}  // namespace msa::cuda::plain
