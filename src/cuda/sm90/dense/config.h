// Sizes and arguments of the dense attention kernels.
//
// A tile is tile_tokens query tokens of one sequence with all G heads of one KV head: row =
// token*G + head. Its keys are walked block by block, from the last visible one down.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/sm90/dense/shape.h"
#include "cuda/tile/part_softmax.h"

namespace msa::cuda::sm90::dense {

/// Output rows [T,Hq]: row (t, h) starts at data + t*token + h*head.
template <class T>
struct HeadRows {
  T* data;  ///< null: not wanted
  int64_t token;
  int64_t head;

  __device__ T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

/// By value into the kernels.
struct Args {
  DeviceBatch batch;
  int heads_kv;     ///< Hkv
  int group;        ///< G
  int tile_tokens;  ///< query tokens of a tile
  bool split;       ///< CTAs take equal shares of all blocks, else whole tiles
  float scale;      ///< softmax_scale * log2(e)

  HeadRows<__nv_bfloat16> o;  ///< either this
  HeadRows<float> o_wide;     ///< or this
  HeadRows<float> lse;
  HeadRows<float> block_max;  ///< a row has block_columns
  int block_columns;

  int* next_tile;              ///< whole tiles: how many are taken
  float* o_parts;              ///< split: [2*CTAs, rows of a tile, D], normalised
  PartSoftmax* softmax_parts;  ///< split: [2*CTAs, rows of a tile]
};

}  // namespace msa::cuda::sm90::dense
