// Sparse and dense attention: a CTA per query token and chunk of the heads of one KV head, which
// walks the listed (or all visible) keys 32 at a time with an online softmax.

#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/scores.h"
#include "cuda/smxx/tile.cuh"
#include "cuda/smxx/walk.cuh"
#include "cuda/softmax_scale.h"

namespace msa::cuda::plain {
namespace {

struct Attend {
  DeviceBatch batch;
  Tensor q;    ///< [T,Hq,D]
  Tensor ids;  ///< [Hkv,T,K], or not given: every visible key
  KeyTensor k, v;
  Tensor o;    ///< [T,Hq,D]
  Tensor lse;  ///< [T,Hq], or not given
  int group, dim, topk;
  float scale;  ///< of the logits, times log2(e)
};

__global__ void __launch_bounds__(128) attend_kernel(Attend a) {
  const auto [kv_head, head, rows] = head_chunk(a.group);
  const int t = static_cast<int>(blockIdx.x);
  const int pitch = pitch_of(a.dim), staged = warps() * kWarpRows;
  float* all_q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [staged][pitch]
  float* all_o = all_q + staged * pitch;                         // [staged][pitch]
  float* all_weights = all_o + staged * pitch;                   // [staged][32]
  float* tile = all_weights + staged * kKeys;                    // [32][pitch]: keys, then values
  const float* q = all_q + warp() * kWarpRows * pitch;
  float* o = all_o + warp() * kWarpRows * pitch;
  float* weights = all_weights + warp() * kWarpRows * kKeys;

  const Query query = query_at(a.batch, t);
  const Walk walk = walk_of(a.batch, query, a.ids, a.topk, t, kv_head);
  stage(all_q, staged, a.dim, a.q.data, a.q.dtype,
        [&](int row) { return row < rows ? a.q.offset(t, head + row) : int64_t{-1}; });
  for (int i = lane(); i < kWarpRows * pitch; i += 32) o[i] = 0;

  float max[kWarpRows], sum[kWarpRows];  // of a row, and of a row in this lane
  for (int i = 0; i < kWarpRows; ++i) max[i] = -infinity(), sum[i] = 0;
  for (int64_t step = 0; step < walk.count; step += kKeys) {
    Place place;
    if (const int key = walk.key(step + lane()); key >= 0) place = place_of(a.batch, query.s, key);
    if (!__any_sync(0xffffffff, place.row >= 0)) continue;  // the same in every warp

    __syncthreads();
    stage_keys(tile, a.dim, a.k, kv_head, place);
    __syncthreads();
    float logit[kWarpRows], decay[kWarpRows];
    products(q, tile, a.dim, logit);
    for (int i = 0; i < kWarpRows; ++i) {
      // Rounded, as the maximum is: the largest logit less itself is 0 at any size.
      const float x = place.row >= 0 ? __fmul_rn(logit[i], a.scale) : -infinity();
      const float most = fmaxf(max[i], warp_max(x));
      const float weight = x == -infinity() ? 0 : exp2f(x - most);
      decay[i] = max[i] == -infinity() ? 0 : exp2f(max[i] - most);
      sum[i] = sum[i] * decay[i] + weight;
      max[i] = most;
      weights[i * kKeys + lane()] = weight;
    }

    __syncthreads();
    stage_keys(tile, a.dim, a.v, kv_head, place);
    __syncthreads();
    add_values(o, weights, tile, a.dim, decay);
  }

  for (int i = 0; i < kWarpRows; ++i) {
    const int row = warp() * kWarpRows + i;
    const float total = warp_sum(sum[i]);
    if (row >= rows) continue;
    for (int d = lane(); d < a.dim; d += 32)
      store(a.o, a.o.offset(t, head + row, d), total == 0 ? 0 : o[i * pitch + d] / total);
    if (lane() == 0 && a.lse.data != nullptr)
      a.lse.at<float>(t, head + row) = total == 0 ? -infinity() : (max[i] + log2f(total)) * kLn2;
  }
}

template <class Params>
Status attend(const Plan& plan, const Params& a, const TensorView& ids, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const RowCut cut(p.group());
  const LaunchShape shape{.grid = dim3(static_cast<uint32_t>(a.q.shape[0]),
                                       static_cast<uint32_t>(p.heads_kv * cut.chunks)),
                          .block = dim3(static_cast<uint32_t>(32 * cut.warps)),
                          .shared_bytes = attention_shared_bytes(p)};
  return launch("attention", attend_kernel, shape, stream,
                Attend{.batch = device_batch(a.batch, a.q.shape[0], a.k, p.block_size),
                       .q = tensor(a.q),
                       .ids = tensor(ids),
                       .k = key_tensor(a.k, p.layout),
                       .v = key_tensor(a.v, p.layout),
                       .o = tensor(a.o),
                       .lse = tensor(a.lse),
                       .group = p.group(),
                       .dim = p.head_dim,
                       .topk = p.topk,
                       .scale = softmax_scale(a.softmax_scale, p.head_dim) * kLog2E});
}

}  // namespace

uint32_t attention_shared_bytes(const Problem& p) {
  const int rows = RowCut(p.group()).warps * kWarpRows;
  return static_cast<uint32_t>(4 * ((2 * rows + kKeys) * pitch_of(p.head_dim) + rows * kKeys));
}

template <>
Status run(const Plan& plan, const SparseAttentionParams& a, Workspace, cudaStream_t stream) {
  return attend(plan, a, a.block_ids, stream);
}

template <>
Status run(const Plan& plan, const DenseAttentionParams& a, Workspace, cudaStream_t stream) {
  MSA_TRY(attend(plan, a, {}, stream));
  if (!a.block_max.given()) return {};
  const Problem& p = plan.problem;
  return block_scores({.batch = device_batch(a.batch, a.q.shape[0], a.k, p.block_size),
                       .q = tensor(a.q),
                       .keys = key_tensor(a.k, p.layout),
                       .scores = tensor(a.block_max),
                       .heads = p.heads_q,
                       .group = p.group(),
                       .dim = p.head_dim,
                       .first = 0,
                       .tokens = static_cast<int>(a.q.shape[0]),
                       .columns = static_cast<int>(a.block_max.shape[2])},
                      stream);
}

}  // namespace msa::cuda::plain
