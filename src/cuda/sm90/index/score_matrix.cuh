// The sink of block scores that stores them all.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/sm90/index/arguments.cuh"

namespace msa::cuda::sm90::index {

/// Every score into a matrix.
template <class Shape>
class ScoreMatrix {
 public:
  struct Storage {};
  __device__ ScoreMatrix(Storage&, const ScoreArguments& a) : a_(a) {}

  __device__ void begin(const Unit& unit, int row) {
    const int query = row >> a_.grid.head_shift, head = row & ((1 << a_.grid.head_shift) - 1);
    const Output& out = a_.out;
    row_ = row < 0 || query >= unit.queries ? nullptr : out.scores.at(unit.token + query, head);
  }
  __device__ void take(const Unit&, int block, float score) {
    if (row_ != nullptr) row_[block * a_.out.block_stride] = fmaxf(score, -INFINITY);
  }
  __device__ void end(const Unit&, int) {}

 private:
  const ScoreArguments& a_;
  float* row_;
};

/// What ScoreMatrix leaves out: scores of blocks behind the last one that a row sees. A warp per
/// row.
inline constexpr int kClearWarps = 8;
__global__ void __launch_bounds__(32 * kClearWarps)
    clear_unseen(const __grid_constant__ Grid grid, const __grid_constant__ Output out) {
  const int row = static_cast<int>(blockIdx.x) * kClearWarps + static_cast<int>(threadIdx.x) / 32;
  const int token = row >> grid.head_shift, head = row & ((1 << grid.head_shift) - 1);
  if (token >= grid.batch.tokens) return;
  const Query query = find_query(grid.batch, grid.selection, token, grid.max_blocks);
  float* scores = out.scores.at(token, head);
  for (int j = query.candidates.visible + static_cast<int>(threadIdx.x) % 32; j < grid.max_blocks;
       j += 32)
    scores[j * out.block_stride] = -INFINITY;
}

}  // namespace msa::cuda::sm90::index
