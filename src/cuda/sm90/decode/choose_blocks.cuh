// The lists of ids alone, from the scores of score_pages.cuh.
#pragma once

#include <cstdint>

#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/decode/select.cuh"
#include "cuda/sm90/decode/token.cuh"

namespace msa::cuda::sm90::decode {

struct ChooseArguments {
  DeviceBatch batch;
  const float* scores;  ///< [T,Hi,columns]
  int64_t columns;
  int32_t topk, init_blocks, local_blocks;
  Rows<int32_t> ids;       ///< [Hi,T,K]
  Rows<float> ids_scores;  ///< [Hi,T,K], or null
};

/// Grid [T, Hi].
__global__ void __launch_bounds__(kConsumers) choose(const __grid_constant__ ChooseArguments a) {
  __shared__ SelectScratch select;
  __shared__ Choice choice;
  const int64_t t = blockIdx.x, head = blockIdx.y;
  if (threadIdx.x < 32) {
    const Token token = find_token(a.batch, static_cast<int>(t));
    if (threadIdx.x == 0) choice = token.choice(a.columns, a.batch.causal);
  }
  __syncthreads();
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
  select.choose(a.scores + (t * gridDim.y + head) * a.columns, 0, choice.blocks, a.topk,
                [&](float score, int j) {
                  return make_key(score, j, choice.forced(j, a.init_blocks, a.local_blocks));
                });
  if (threadIdx.x >= 32) return;
  write_list(choice, threadIdx.x < kMaxChosen ? select.best[threadIdx.x] : 0, a.topk,
             a.ids.at(t, head), a.ids_scores.data == nullptr ? nullptr : a.ids_scores.at(t, head));
}

}  // namespace msa::cuda::sm90::decode
