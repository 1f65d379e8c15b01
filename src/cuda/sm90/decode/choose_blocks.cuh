// The lists of ids alone, from the scores of score_pages.cuh.
#pragma once

#include <cstdint>

#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/decode/tiles.cuh"
#include "cuda/sm90/decode/token.cuh"

namespace msa::cuda::sm90::decode {

struct ChooseArguments {
  DeviceBatch batch;
  const float* scores;  ///< [T,Hi,columns]
  int64_t columns;
  Selection selection;
  Rows<int32_t> ids;       ///< [Hi,T,K]
  Rows<float> ids_scores;  ///< [Hi,T,K], or null
};

/// Grid [T, Hi].
__global__ void __launch_bounds__(kConsumers) choose(const __grid_constant__ ChooseArguments a) {
  __shared__ TopK top;
  __shared__ Candidates blocks;
  const int64_t t = blockIdx.x, head = blockIdx.y;
  if (threadIdx.x < 32) {
    const Token token = find_token(a.batch, static_cast<int>(t));
    if (threadIdx.x == 0) blocks = token.choices(a.selection, a.columns, a.batch.causal);
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  top.choose(a.scores + (t * gridDim.y + head) * a.columns, 0, blocks.visible, a.selection.topk,
             [&](float score, int j) {
               return key_of(blocks.is_forced(j) ? kForcedOrder : order_of(score), j);
             });
  if (threadIdx.x >= 32) return;
  write_list(threadIdx.x < TopK::kBest ? top.best[threadIdx.x] : kNoBlock,
             min(blocks.visible, a.selection.topk), a.selection.topk, blocks.block0,
             a.ids.at(t, head), a.ids_scores.data == nullptr ? nullptr : a.ids_scores.at(t, head));
}

}  // namespace msa::cuda::sm90::decode
