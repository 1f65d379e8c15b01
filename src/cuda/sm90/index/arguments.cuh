// What the kernels of block scores are launched with.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda.h>

#include "cuda/rows.h"
#include "cuda/sm90/index/work.cuh"

namespace msa::cuda::sm90::index {

/// Where a thread's results go.
struct Output {
  Rows<int32_t> ids;     ///< [Hi,T,K]
  Rows<float> scores;    ///< BestBlocks: [Hi,T,K] or null; ScoreMatrix: [Hi,T,blocks]
  int64_t block_stride;  ///< ScoreMatrix: of scores
  Entry* lists;  ///< [tiles, rows, splits, kList] when the blocks of a tile are split, else null
};

struct ScoreArguments {
  CUtensorMap q;  ///< q_idx [T,Hi,Di], boxes of one warpgroup's rows
  CUtensorMap k;  ///< k_idx, boxes of one block
  Grid grid;
  Output out;
};

}  // namespace msa::cuda::sm90::index
