// Gradients of sparse and dense attention, in two walks that recompute the probabilities from the
// LSEs, so that every element is one sum in one order:
//   query_gradient_kernel  as the forward pass, a CTA per query token and chunk of the heads of one
//                          KV head walks the keys that it reads: dq, and delta = o . d_o per head;
//   key_gradient_kernel    a CTA per 16 rows of k and KV head walks the queries that read them, a
//                          lane each, one query head after the other: dk and dv.
#include <algorithm>

#include "cuda/launch.h"
#include "cuda/smxx/inverse_lists.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"
#include "cuda/smxx/walk.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tile/huge_lse.cuh"

namespace msa::cuda::plain {
namespace {

struct Backward {
  DeviceBatch batch;
  Tensor q;    ///< [T,Hq,D]
  Tensor ids;  ///< [Hkv,T,K], or not given: every visible key
  KeyTensor k, v;
  Tensor o, d_o;      ///< [T,Hq,D]
  Tensor lse;         ///< f32 [T,Hq]
  float* delta;       ///< f32 [T,Hq]: o . d_o
  Tensor dq, dk, dv;  ///< as q, k, v
  InverseLists lists;
  int heads, group, dim, topk;
  float scale;  ///< of the logits
};

/// Probability of a key for a query, 0 if the query does not see it or sees nothing at all.
__device__ float probability(bool sees, float product, float scale, float lse) {
  return sees && lse != -infinity() ? expf(log_probability(product, scale, lse)) : 0;
}

/// Gradient of q . k, but for the scale.
__device__ float score_gradient(float p, float d_o_v, float delta) {
  return p == 0 ? 0 : p * (d_o_v - delta);
}

__global__ void __launch_bounds__(128, 3) query_gradient_kernel(Backward a) {
  const auto [kv_head, head, rows] = head_chunk(a.group);
  const int t = static_cast<int>(blockIdx.x);
  const int pitch = pitch_of(a.dim), staged = warps() * kWarpRows;
  float* all_q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [staged][pitch]
  float* all_d_o = all_q + staged * pitch;                       // [staged][pitch]
  float* all_dq = all_d_o + staged * pitch;                      // [staged][pitch]: o, then dq
  float* all_ds = all_dq + staged * pitch;                       // [staged][32]
  float* tile = all_ds + staged * kKeys;                         // [32][pitch]: values, then keys
  const float* q = all_q + warp() * kWarpRows * pitch;
  const float* d_o = all_d_o + warp() * kWarpRows * pitch;
  float* dq = all_dq + warp() * kWarpRows * pitch;
  float* ds = all_ds + warp() * kWarpRows * kKeys;

  const Query query = query_at(a.batch, t);
  const Walk walk = walk_of(a.batch, query, a.ids, a.topk, t, kv_head);
  const auto stage_heads = [&](float* to, const Tensor& from) {
    stage(to, staged, a.dim, from.data, from.dtype,
          [&](int row) { return row < rows ? from.offset(t, head + row) : int64_t{-1}; });
  };
  stage_heads(all_q, a.q);
  stage_heads(all_d_o, a.d_o);
  stage_heads(all_dq, a.o);
  __syncthreads();

  float lse[kWarpRows], delta[kWarpRows];
  for (int i = 0; i < kWarpRows; ++i) {
    const int row = warp() * kWarpRows + i;
    float sum = 0;
    for (int d = lane(); d < a.dim; d += 32) sum = fmaf(dq[i * pitch + d], d_o[i * pitch + d], sum);
    delta[i] = warp_sum(sum);
    lse[i] = row < rows ? a.lse.at<const float>(t, head + row) : -infinity();
    if (lane() == 0 && row < rows) a.delta[int64_t{t} * a.heads + head + row] = delta[i];
    for (int d = lane(); d < pitch; d += 32) dq[i * pitch + d] = 0;
  }

  for (int64_t step = 0; step < walk.count; step += kKeys) {
    Place place;
    if (const int key = walk.key(step + lane()); key >= 0) place = place_of(a.batch, query.s, key);
    if (!__any_sync(0xffffffff, place.row >= 0)) continue;  // the same in every warp

    __syncthreads();
    stage_keys(tile, a.dim, a.v, kv_head, place);
    __syncthreads();
    float d_o_v[kWarpRows], product[kWarpRows];
    products(d_o, tile, a.dim, d_o_v);

    __syncthreads();
    stage_keys(tile, a.dim, a.k, kv_head, place);
    __syncthreads();
    products(q, tile, a.dim, product);
    for (int i = 0; i < kWarpRows; ++i) {
      const float p = probability(place.row >= 0, product[i], a.scale, lse[i]);
      ds[i * kKeys + lane()] = score_gradient(p, d_o_v[i], delta[i]);
    }
    __syncwarp();
    add_values(dq, ds, tile, a.dim);
  }

  for (int i = 0; i < kWarpRows; ++i) {
    const int row = warp() * kWarpRows + i;
    if (row >= rows) continue;
    for (int d = lane(); d < a.dim; d += 32)
      store(a.dq, a.dq.offset(t, head + row, d), dq[i * pitch + d] * a.scale);
  }
}

__global__ void __launch_bounds__(128, 3) key_gradient_kernel(Backward a) {
  const int kv_head = static_cast<int>(blockIdx.y);
  const int pitch = pitch_of(a.dim);
  float* all_k = reinterpret_cast<float*>(ptx::dynamic_shared);  // [16][pitch]
  float* all_v = all_k + kMostRows * pitch;                      // [16][pitch]
  float* all_dk = all_v + kMostRows * pitch;                     // [16][pitch]
  float* all_dv = all_dk + kMostRows * pitch;                    // [16][pitch]
  float* all_weights = all_dv + kMostRows * pitch;               // [16][32]: probabilities, then dS
  float* q_tile = all_weights + kMostRows * kQueries;            // [32][pitch]
  float* d_o_tile = q_tile + kQueries * pitch;                   // [32][pitch]
  const int first_row = warp() * kWarpRows;
  const float* k = all_k + first_row * pitch;
  const float* v = all_v + first_row * pitch;
  float* dk = all_dk + first_row * pitch;
  float* dv = all_dv + first_row * pitch;
  float* weights = all_weights + first_row * kQueries;

  const int begin = static_cast<int>(blockIdx.x) * kMostRows;
  const int end = min(begin + kMostRows, a.batch.keys);
  KeyRun run;
  for (int at = begin; at < end; at += run.count) {
    run = key_run(a.batch, at, end);
    __syncthreads();
    stage_run(all_k, a.dim, a.k, kv_head, run);
    stage_run(all_v, a.dim, a.v, kv_head, run);
    for (int i = lane(); i < kWarpRows * pitch; i += 32) dk[i] = dv[i] = 0;
    __syncwarp();

    const Readers readers = readers_of(a.batch, run, a.lists, kv_head);
    for (int64_t step = 0; step < readers.count; step += kQueries) {
      const Reader reader = readers.at(step + lane(), a.batch, run.s);
      if (!__any_sync(0xffffffff, run.sees(reader.visible))) continue;  // the same in every warp
      for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
        float lse = -infinity(), delta = 0;
        if (run.sees(reader.visible)) {
          lse = a.lse.at<const float>(reader.t, head);
          delta = a.delta[int64_t{reader.t} * a.heads + head];
        }
        const int t = lse == -infinity() ? -1 : reader.t;

        __syncthreads();
        stage_queries(q_tile, a.dim, a.q, head, t);
        stage_queries(d_o_tile, a.dim, a.d_o, head, t);
        __syncthreads();
        float product[kWarpRows], d_o_v[kWarpRows], p[kWarpRows];
        products(k, q_tile, a.dim, product);
        products(v, d_o_tile, a.dim, d_o_v);
        for (int i = 0; i < kWarpRows; ++i) {
          p[i] = probability(run.sees(reader.visible, first_row + i), product[i], a.scale, lse);
          weights[i * kQueries + lane()] = p[i];
        }
        __syncwarp();
        add_values(dv, weights, d_o_tile, a.dim);
        __syncwarp();
        for (int i = 0; i < kWarpRows; ++i)
          weights[i * kQueries + lane()] = score_gradient(p[i], d_o_v[i], delta);
        __syncwarp();
        add_values(dk, weights, q_tile, a.dim);
      }
    }

    for (int i = 0; i < kWarpRows && first_row + i < run.count; ++i) {
      const int row = run.begin + first_row + i;
      for (int d = lane(); d < a.dim; d += 32) {
        store(a.dk, a.dk.offset(row, kv_head, d), dk[i * pitch + d] * a.scale);
        store(a.dv, a.dv.offset(row, kv_head, d), dv[i * pitch + d]);
      }
    }
  }
}

uint32_t query_shared_bytes(const Problem& p) {
  const int rows = RowCut(p.group()).warps * kWarpRows;
  return static_cast<uint32_t>(4 * ((3 * rows + kKeys) * pitch_of(p.head_dim) + rows * kKeys));
}

uint32_t key_shared_bytes(const Problem& p) {
  return static_cast<uint32_t>(
      4 * ((4 * kMostRows + 2 * kQueries) * pitch_of(p.head_dim) + kMostRows * kQueries));
}

int64_t delta_bytes(const Problem& p, int64_t tokens) { return aligned(tokens * p.heads_q * 4); }

}  // namespace

uint32_t attention_backward_shared_bytes(const Problem& p) {
  return std::max(query_shared_bytes(p), key_shared_bytes(p));
}

int64_t attention_backward_bytes(const Problem& p, const Limits& limits) {
  const bool sparse = p.op == Op::kSparseAttentionBackward;
  return delta_bytes(p, limits.max_tokens) + (sparse ? inverse_lists_bytes(p, limits) : 0);
}

template <>
Status run(const Plan& plan, const AttentionBackwardParams& a, Workspace workspace,
           cudaStream_t stream) {
  const Problem& p = plan.problem;
  const int64_t tokens = a.q.shape[0], keys = a.k.shape[0], delta = delta_bytes(p, tokens);
  Backward backward{.batch = device_batch(a.batch, tokens, a.k, p.block_size),
                    .q = tensor(a.q),
                    .ids = tensor(a.block_ids),
                    .k = key_tensor(a.k, p.layout),
                    .v = key_tensor(a.v, p.layout),
                    .o = tensor(a.o),
                    .d_o = tensor(a.d_o),
                    .lse = tensor(a.lse),
                    .delta = static_cast<float*>(workspace.data),
                    .dq = tensor(a.dq),
                    .dk = tensor(a.dk),
                    .dv = tensor(a.dv),
                    .lists = {},
                    .heads = p.heads_q,
                    .group = p.group(),
                    .dim = p.head_dim,
                    .topk = p.topk,
                    .scale = softmax_scale(a.softmax_scale, p.head_dim)};
  MSA_TRY(inverse_lists(plan, a.block_ids, a.row_ptr, a.entries, a.batch, keys,
                        {static_cast<std::byte*>(workspace.data) + delta}, stream,
                        &backward.lists));

  const RowCut cut(p.group());
  const LaunchShape by_query{
      .grid = dim3(static_cast<uint32_t>(tokens), static_cast<uint32_t>(p.heads_kv * cut.chunks)),
      .block = dim3(static_cast<uint32_t>(32 * cut.warps)),
      .shared_bytes = query_shared_bytes(p)};
  const LaunchShape by_key{.grid = dim3(static_cast<uint32_t>(ceil_div(keys, kMostRows)),
                                        static_cast<uint32_t>(p.heads_kv)),
                           .block = dim3(kKeyThreads),
                           .shared_bytes = key_shared_bytes(p)};
  MSA_TRY(launch("attention_backward dq", query_gradient_kernel, by_query, stream, backward));
  return launch("attention_backward dk dv", key_gradient_kernel, by_key, stream, backward);
}

}  // namespace msa::cuda::plain
