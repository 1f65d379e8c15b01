// The KL loss of the index branch with its gradients, and the LSE that both are made of. Teacher
// and student of a (query, key) pair are recomputed from the LSEs wherever they are needed:
//   index_lse_kernel  a warp per index query walks the keys that it reads;
//   query_kernel      a CTA per index query and the heads of its KV head walks the same keys: kl,
//                     dq_idx;
//   key_kernel        a CTA per 16 rows of k_idx walks the queries that read them, a lane each, KV
//                     head after KV head: dk_idx.
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

// ---- index LSE ----

struct IndexLse {
  DeviceBatch batch;
  Tensor q_idx;  ///< [T,Hi,Di]
  KeyTensor k_idx;
  Tensor ids;  ///< [Hi,T,K], or not given: every visible key
  Tensor lse;  ///< f32 [T,Hi]
  int dim, topk;
  float scale;  ///< of the logits, times log2(e)
};

__global__ void __launch_bounds__(32) index_lse_kernel(IndexLse a) {
  const int t = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  float* q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [pitch]
  float* keys = q + pitch_of(a.dim);                         // [32][pitch]

  const Query query = query_at(a.batch, t);
  const Walk walk = walk_of(a.batch, query, a.ids, a.topk, t, head);
  stage(q, 1, a.dim, a.q_idx.data, a.q_idx.dtype, [&](int) { return a.q_idx.offset(t, head); });
  float max = -infinity(), sum = 0;  // of this lane's keys
  for (int64_t step = 0; step < walk.count; step += kKeys) {
    Place place;
    if (const int key = walk.key(step + lane()); key >= 0) place = place_of(a.batch, query.s, key);
    __syncwarp();
    stage_keys(keys, a.dim, a.k_idx, 0, place);
    __syncwarp();
    float product[1];
    products(q, keys, a.dim, product);
    if (place.row < 0) continue;
    const float logit = __fmul_rn(product[0], a.scale), most = fmaxf(max, logit);
    sum = (max == -infinity() ? 0 : sum * exp2f(max - most)) + exp2f(logit - most);
    max = most;
  }
  const float most = warp_max(max);
  const float total = warp_sum(max == -infinity() ? 0 : sum * exp2f(max - most));
  if (lane() == 0)
    a.lse.at<float>(t, head) = total == 0 ? -infinity() : (most + log2f(total)) * kLn2;
}

// ---- the loss and its gradients ----

struct Kl {
  DeviceBatch batch;
  Tensor q;  ///< [T,Hq,D]
  KeyTensor k;
  Tensor lse;    ///< f32 [T,Hq]
  Tensor q_idx;  ///< [T,Hi,Di]
  KeyTensor k_idx;
  Tensor index_lse;  ///< f32 [T,Hi]
  Tensor ids;        ///< [Hkv,T,K], or not given: every visible key
  InverseLists lists;
  Tensor dq_idx;  ///< [T,Hi,Di], or not given: the loss alone
  Tensor dk_idx;  ///< [S,Di]
  Tensor kl;      ///< f32 [T,Hi], or not given
  int heads_kv, group, dim, index_dim, topk;
  float scale, index_scale;

  /// The gradient of the loss by q_idx . k_idx is this times (student - teacher).
  __device__ float factor() const {
    const int queries = batch.clamp(batch.cu_seqlens_q[batch.sequences], 0, batch.tokens);
    return index_scale / (static_cast<float>(max(queries, 1)) * static_cast<float>(heads_kv));
  }
};

/// The share of one head in the teacher, times G; 0 for a head that sees nothing.
__device__ float teacher_share(float product, float scale, float lse) {
  return lse == -infinity() ? 0 : expf(log_probability(product, scale, lse));
}

__global__ void __launch_bounds__(128, 4) query_kernel(Kl a) {
  const int t = static_cast<int>(blockIdx.x), kv_head = static_cast<int>(blockIdx.y);
  const int pitch = pitch_of(a.dim), index_pitch = pitch_of(a.index_dim);
  const int staged = warps() * kWarpRows;
  float* q = reinterpret_cast<float*>(ptx::dynamic_shared);  // [staged][pitch]
  float* q_idx = q + staged * pitch;                         // [index_pitch]
  float* dq_idx = q_idx + index_pitch;                       // [index_pitch]
  float* shares = dq_idx + index_pitch;       // [warps][32]: of a warp's heads in the teacher
  float* weights = shares + warps() * kKeys;  // [32]: student - teacher
  float* tile = weights + kKeys;              // [32][either pitch]: keys, then index keys

  const Query query = query_at(a.batch, t);
  Walk walk = walk_of(a.batch, query, a.ids, a.topk, t, kv_head);
  const float index_lse = walk.count > 0 ? a.index_lse.at<const float>(t, kv_head) : -infinity();
  if (index_lse == -infinity()) walk.count = 0;
  stage(q_idx, 1, a.index_dim, a.q_idx.data, a.q_idx.dtype,
        [&](int) { return a.q_idx.offset(t, kv_head); });
  const bool gradient = a.dq_idx.data != nullptr;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int d = thread; d < a.index_dim; d += threads) dq_idx[d] = 0;  // and adds to these alone

  int staged_head = -1;  // the first head whose row is in q
  float divergence = 0;  // of this lane's keys, in warp 0
  for (int64_t step = 0; step < walk.count; step += kKeys) {
    Place place;
    if (const int key = walk.key(step + lane()); key >= 0) place = place_of(a.batch, query.s, key);
    if (!__any_sync(0xffffffff, place.row >= 0)) continue;  // the same in every warp

    __syncthreads();
    stage_keys(tile, a.dim, a.k, kv_head, place);
    float share = 0;
    for (int first = 0; first < a.group; first += staged) {
      const int head = kv_head * a.group + first, rows = min(a.group - first, staged);
      if (head != staged_head) {
        __syncthreads();
        stage(q, staged, a.dim, a.q.data, a.q.dtype,
              [&](int row) { return row < rows ? a.q.offset(t, head + row) : int64_t{-1}; });
        staged_head = head;
      }
      __syncthreads();
      float product[kWarpRows];
      products(q + warp() * kWarpRows * pitch, tile, a.dim, product);
      for (int i = 0; i < kWarpRows; ++i) {
        const int row = warp() * kWarpRows + i;
        if (row < rows)
          share += teacher_share(product[i], a.scale, a.lse.at<const float>(t, head + row));
      }
    }
    shares[warp() * kKeys + lane()] = share;

    __syncthreads();
    stage_keys(tile, a.index_dim, a.k_idx, 0, place);
    __syncthreads();
    if (warp() == 0) {
      float product[1], teacher = 0;
      products(q_idx, tile, a.index_dim, product);
      for (int w = 0; w < warps(); ++w) teacher += shares[w * kKeys + lane()];
      teacher /= static_cast<float>(a.group);
      const float log_student = log_probability(product[0], a.index_scale, index_lse);
      weights[lane()] = place.row >= 0 ? expf(log_student) - teacher : 0;
      if (place.row >= 0 && teacher > 0) divergence += teacher * (logf(teacher) - log_student);
    }
    if (!gradient) continue;
    __syncthreads();
    for (int d = thread; d < a.index_dim; d += threads) {
      float sum = dq_idx[d];
      for (int key = 0; key < kKeys; ++key)
        sum = fmaf(weights[key], tile[key * index_pitch + d], sum);
      dq_idx[d] = sum;
    }
  }

  for (int d = thread; gradient && d < a.index_dim; d += threads)
    store(a.dq_idx, a.dq_idx.offset(t, kv_head, d), dq_idx[d] * a.factor());
  divergence = warp_sum(divergence);
  if (thread == 0 && a.kl.data != nullptr) a.kl.at<float>(t, kv_head) = divergence;
}

__global__ void __launch_bounds__(128, 4) key_kernel(Kl a) {
  const int pitch = pitch_of(a.dim), index_pitch = pitch_of(a.index_dim);
  float* all_k = reinterpret_cast<float*>(ptx::dynamic_shared);  // [16][pitch]
  float* all_k_idx = all_k + kMostRows * pitch;                  // [16][index_pitch]
  float* all_dk_idx = all_k_idx + kMostRows * index_pitch;       // [16][index_pitch]
  float* all_weights = all_dk_idx + kMostRows * index_pitch;     // [16][32]: student - teacher
  float* tile = all_weights + kMostRows * kQueries;  // [32][either pitch]: queries, index queries
  const int first_row = warp() * kWarpRows;
  const float* k = all_k + first_row * pitch;
  const float* k_idx = all_k_idx + first_row * index_pitch;
  float* dk_idx = all_dk_idx + first_row * index_pitch;
  float* weights = all_weights + first_row * kQueries;

  const int begin = static_cast<int>(blockIdx.x) * kMostRows;
  const int end = min(begin + kMostRows, a.batch.keys);
  KeyRun run;
  for (int at = begin; at < end; at += run.count) {
    run = key_run(a.batch, at, end);
    __syncthreads();
    stage_run(all_k_idx, a.index_dim, a.k_idx, 0, run);
    for (int i = lane(); i < kWarpRows * index_pitch; i += 32) dk_idx[i] = 0;
    __syncwarp();

    for (int kv_head = 0; kv_head < a.heads_kv; ++kv_head) {
      const Readers readers = readers_of(a.batch, run, a.lists, kv_head);
      __syncthreads();
      stage_run(all_k, a.dim, a.k, kv_head, run);
      for (int64_t step = 0; step < readers.count; step += kQueries) {
        const Reader reader = readers.at(step + lane(), a.batch, run.s);
        const float index_lse =
            run.sees(reader.visible) ? a.index_lse.at<const float>(reader.t, kv_head) : -infinity();
        const int t = index_lse == -infinity() ? -1 : reader.t;
        if (!__any_sync(0xffffffff, t >= 0)) continue;  // the same in every warp

        float share[kWarpRows] = {};
        for (int head = kv_head * a.group; head < (kv_head + 1) * a.group; ++head) {
          __syncthreads();
          stage_queries(tile, a.dim, a.q, head, t);
          __syncthreads();
          const float lse = t >= 0 ? a.lse.at<const float>(t, head) : -infinity();
          float product[kWarpRows];
          products(k, tile, a.dim, product);
          for (int i = 0; i < kWarpRows; ++i) share[i] += teacher_share(product[i], a.scale, lse);
        }

        __syncthreads();
        stage_queries(tile, a.index_dim, a.q_idx, kv_head, t);
        __syncthreads();
        float product[kWarpRows];
        products(k_idx, tile, a.index_dim, product);
        for (int i = 0; i < kWarpRows; ++i) {
          const bool sees = t >= 0 && run.sees(reader.visible, first_row + i);
          const float teacher = share[i] / static_cast<float>(a.group);
          weights[i * kQueries + lane()] =
              sees ? expf(log_probability(product[i], a.index_scale, index_lse)) - teacher : 0;
        }
        __syncwarp();
        add_values(dk_idx, weights, tile, a.index_dim);
      }
    }

    for (int i = 0; i < kWarpRows && first_row + i < run.count; ++i)
      for (int d = lane(); d < a.index_dim; d += 32)
        store(a.dk_idx, a.dk_idx.offset(run.begin + first_row + i, d),
              dk_idx[i * index_pitch + d] * a.factor());
  }
}

uint32_t query_shared_bytes(const Problem& p) {
  const int pitch = pitch_of(p.head_dim), index_pitch = pitch_of(p.index_dim);
  const int warps = RowCut(p.group()).warps;
  return static_cast<uint32_t>(4 * (warps * kWarpRows * pitch + 2 * index_pitch +
                                    kKeys * (warps + 1 + std::max(pitch, index_pitch))));
}

uint32_t key_shared_bytes(const Problem& p) {
  const int pitch = pitch_of(p.head_dim), index_pitch = pitch_of(p.index_dim);
  return static_cast<uint32_t>(4 * (kMostRows * (pitch + 2 * index_pitch + kQueries) +
                                    kQueries * std::max(pitch, index_pitch)));
}

}  // namespace

uint32_t index_lse_shared_bytes(const Problem& p) {
  return static_cast<uint32_t>(4 * (1 + kKeys) * pitch_of(p.index_dim));
}

template <>
Status run(const Plan& plan, const IndexLseParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const int64_t tokens = a.q_idx.shape[0];
  const LaunchShape shape{
      .grid = dim3(static_cast<uint32_t>(tokens), static_cast<uint32_t>(p.heads_kv)),
      .block = dim3(32),
      .shared_bytes = index_lse_shared_bytes(p)};
  return launch("index_lse", index_lse_kernel, shape, stream,
                IndexLse{.batch = device_batch(a.batch, tokens, a.k_idx, p.block_size),
                         .q_idx = tensor(a.q_idx),
                         .k_idx = key_tensor(a.k_idx, p.layout),
                         .ids = tensor(a.block_ids),
                         .lse = tensor(a.lse),
                         .dim = p.index_dim,
                         .topk = p.topk,
                         .scale = softmax_scale(0, p.index_dim) * kLog2E});
}

uint32_t kl_shared_bytes(const Problem& p) {
  const uint32_t query = query_shared_bytes(p);
  return p.op == Op::kKlLoss ? query : std::max(query, key_shared_bytes(p));
}

int64_t kl_bytes(const Problem& p, const Limits& limits) { return inverse_lists_bytes(p, limits); }

template <>
Status run(const Plan& plan, const KlParams& a, Workspace workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const int64_t tokens = a.q.shape[0], keys = a.k.shape[0];
  const bool gradients = p.op == Op::kKlBackward;
  Kl kl{.batch = device_batch(a.batch, tokens, a.k, p.block_size),
        .q = tensor(a.q),
        .k = key_tensor(a.k, p.layout),
        .lse = tensor(a.lse),
        .q_idx = tensor(a.q_idx),
        .k_idx = key_tensor(a.k_idx, p.layout),
        .index_lse = tensor(a.index_lse),
        .ids = tensor(a.block_ids),
        .lists = {},
        .dq_idx = tensor(a.dq_idx),
        .dk_idx = tensor(a.dk_idx),
        .kl = tensor(a.kl),
        .heads_kv = p.heads_kv,
        .group = p.group(),
        .dim = p.head_dim,
        .index_dim = p.index_dim,
        .topk = p.topk,
        .scale = softmax_scale(a.softmax_scale, p.head_dim),
        .index_scale = softmax_scale(0, p.index_dim)};
  const LaunchShape by_query{
      .grid = dim3(static_cast<uint32_t>(tokens), static_cast<uint32_t>(p.heads_kv)),
      .block = dim3(static_cast<uint32_t>(32 * RowCut(p.group()).warps)),
      .shared_bytes = query_shared_bytes(p)};
  MSA_TRY(launch("kl", query_kernel, by_query, stream, kl));
  if (!gradients) return {};
  MSA_TRY(inverse_lists(plan, a.block_ids, a.row_ptr, a.entries, a.batch, keys, workspace, stream,
                        &kl.lists));
  const LaunchShape by_key{.grid = dim3(static_cast<uint32_t>(ceil_div(keys, kMostRows))),
                           .block = dim3(kKeyThreads),
                           .shared_bytes = key_shared_bytes(p)};
  return launch("kl dk_idx", key_kernel, by_key, stream, kl);
}

}  // namespace msa::cuda::plain
