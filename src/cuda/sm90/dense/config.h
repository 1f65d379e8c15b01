// Sizes and arguments of the dense attention kernels.
//
// A tile is tile_tokens query tokens of one sequence with all G heads of one KV head: row =
// token*G + head. Its keys are walked block by block, from the last visible one down.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/dense/shape.h"
#include "cuda/tile/part_softmax.h"

namespace msa::cuda::sm90::dense {

/// By value into the kernels.
struct Args {
  DeviceBatch batch;
  int heads_kv;     ///< Hkv
  int group;        ///< G
  int tile_tokens;  ///< query tokens of a tile
  bool split;       ///< CTAs take equal shares of all blocks, else whole tiles
  float scale;      ///< softmax_scale * log2(e)

  Rows<__nv_bfloat16> o;  ///< either this
  Rows<float> o_wide;     ///< or this
  Rows<float> lse;
  Rows<float> block_max;  ///< a row has block_columns
  int block_columns;

  int* next_tile;              ///< whole tiles: how many are taken
  float* o_parts;              ///< split: [2*CTAs, rows of a tile, D], normalised
  PartSoftmax* softmax_parts;  ///< split: [2*CTAs, rows of a tile]
};

}  // namespace msa::cuda::sm90::dense
