// Scores of blocks: an operator of its own, the first half of index_select, and the maxima of
// dense attention.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/smxx/tensor.cuh"

namespace msa::cuda::plain {

/// scores[h,t,j] = max over the visible tokens s of block j of q[first+t,h] . keys[s, h/group].
struct BlockScores {
  DeviceBatch batch;
  Tensor q;  ///< [T,H,dim]
  KeyTensor keys;
  Tensor scores;  ///< f32 [H,tokens,columns]
  int heads;      ///< H
  int group;      ///< query heads of one key head
  int dim;
  int first;   ///< query row of the first row of scores
  int tokens;  ///< rows of scores
  int columns;
};
Status block_scores(const BlockScores& a, cudaStream_t stream);

}  // namespace msa::cuda::plain
