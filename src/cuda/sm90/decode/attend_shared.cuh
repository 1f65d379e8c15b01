// What the attention of a decode step is launched with, what its CTAs keep in shared memory, and
// how a cluster divides its work.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/decode/tiles.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/topk.cuh"

namespace msa::cuda::sm90::decode {

inline constexpr int kStages = 3;  // of 32 KB: two CTAs fit on an SM, with 192 KB in flight

/// Everything a launch hands to the kernel.
struct AttendArguments {
  CUtensorMap q;  ///< [T,Hq,D], boxes of the G heads of one token
  CUtensorMap k;  ///< pages [P,Hkv,Bk,D], boxes of one page
  CUtensorMap v;
  DeviceBatch batch;
  Rows<int32_t> ids;  ///< [Hkv,T,K]: the lists, or where the chosen ones go (then null is fine)
  int32_t topk;       ///< K
  int32_t group;      ///< G
  float scale;        ///< softmax_scale * log2(e)
  Rows<void> o;       ///< [T,Hq,D]
  bool o_is_f32;      ///< else bf16
  Rows<float> lse;    ///< [T,Hq], or null
  // Where this kernel chooses the blocks itself:
  const float* scores;  ///< [T,Hkv,columns]
  int64_t columns;
  Selection selection;  ///< its K is also that of given lists
};

/// One block of this CTA's share.
struct ListedBlock {
  int32_t page;
  int32_t visible;  ///< keys of it that the token sees, 1..Bk
};

/// What one CTA found for one row.
struct Part {
  float o[kDim];
  float sum[kWarps];  ///< over each warp's keys
  float max;
  float unused[3];
};
static_assert(sizeof(Part) % 16 == 0);

struct AttendShared {
  KeyTile ring[kStages];           // K and V of the blocks in turn
  RowTile q;                       // then the probabilities [16 heads, 128 keys]
  Part parts[kRows];               // of the rows this CTA finishes, [cluster size, its rows]
  float block_max[kRows][kWarps];  // of each warp's 16 keys
  ListedBlock list[kMaxList];
  int32_t listed;
  Candidates choices;
  BlockKey winners[kMaxChosen];  // the token's list, if it is chosen here
  ptx::Barrier q_full, parts_full, met, known;
  RingBarriers<kStages> barriers;

  /// Before the first load.
  __device__ TopK& select() {
    static_assert(sizeof(TopK) <= sizeof(KeyTile));
    return reinterpret_cast<TopK&>(ring[kStages - 1]);
  }
  /// To other CTAs, behind the last block, where `stage` is the one that would be used next.
  __device__ Part* outgoing(int stage) {
    static_assert(sizeof(Part[kRows]) <= sizeof(KeyTile));
    return reinterpret_cast<Part*>(&ring[stage]);
  }
};
static_assert(2 * (sizeof(AttendShared) + 1024) <= 228 * 1024, "two CTAs fit on an SM");

/// How the 16 rows are divided among the CTAs of the cluster that finish them.
struct Split {
  int parts;     ///< CTAs, 1..16, a power of two
  int rank;      ///< this one
  int row_bits;  ///< log2(rows of each)

  /// Of n things in fours, how many each CTA takes: a multiple of 4. No division.
  __device__ int share(int n) const {
    const int bits = __clz(1) - __clz(parts) + 2;
    return ((n + (1 << bits) - 1) >> bits) * 4;
  }

  __device__ static Split of_cluster() {
    const auto parts = static_cast<int>(ptx::cluster_size());
    return {.parts = parts,
            .rank = static_cast<int>(ptx::cluster_rank()),
            .row_bits = __clz(parts) - __clz(kRows)};
  }
  /// Whether the CTAs share the choice among so many blocks.
  __device__ bool divides(int blocks, int topk) const { return parts > 1 && blocks > topk; }
  __device__ int rows() const { return 1 << row_bits; }
  /// Rows that are heads of the group, of this CTA.
  __device__ int own_rows(int group) const {
    return min(max(group - (rank << row_bits), 0), rows());
  }
  __device__ int slot(int part, int row) const { return (part << row_bits) + row; }
};

}  // namespace msa::cuda::sm90::decode
