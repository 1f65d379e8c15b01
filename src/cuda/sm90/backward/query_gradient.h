// Gradients of queries, as launch.cu starts them. The kernel: query_gradient.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/walk/lists.cuh"
#include "msa/status.h"

namespace msa::cuda::sm90::backward {

struct Maps {
  CUtensorMap q, d_o;  ///< bf16 [T,Hq,D], boxes of one token's G heads (map_queries)
  CUtensorMap k, v;    ///< bf16 [S,Hkv,D], boxes of kBlock tokens (map_keys)
};

/// What kernels of a call tell each other, zeros ahead of it.
struct Words {
  int32_t next_tile;  ///< tiles of queries taken so far
  int32_t huge;       ///< whether an LSE is huge (tile/huge_lse.cuh): then P is cut at 1
};

struct QueryGradientArgs {
  DeviceBatch batch;       ///< packed keys
  walk::Lists lists;       ///< ids null and topk 0: every block counts
  const float* row_terms;  ///< f32 [T,Hkv,2,G] of prepare.cuh
  Rows<void> dq;           ///< out [T,Hq,D], 16-byte aligned rows
  float scale;             ///< softmax_scale
  int heads_kv;            ///< Hkv
  Words* words;            ///< in the workspace
};

/// dq[t,h] = sum_s dS k[s] over the tokens of the forward pass; zeros for rows that read nothing,
/// padding included. G is 8 or 16, Out __nv_bfloat16 or float. `sms`: of the device, one CTA each.
template <int kGroup, class Out>
Status launch_query_gradient(const Maps& maps, const QueryGradientArgs& args, uint32_t sms,
                             cudaStream_t stream);

}  // namespace msa::cuda::sm90::backward
