// What a step of the KL needs, and the warps that fetch it.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/kl/config.h"
#include "cuda/sm90/kl/readers.cuh"
#include "cuda/softmax_scale.h"
#include "cuda/tile/huge_lse.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda::sm90::kl {

struct KlArgs {
  Readers readers;
  Rows<const float> lse;            ///< [T,Hq]
  Rows<const float> index_lse;      ///< [T,Hi]
  Rows<const __nv_bfloat16> q_idx;  ///< [T,Hi,Di]
  float scale, index_scale;         ///< c = softmax_scale * log2(e), c' = log2(e) / sqrt(Di)
  const int32_t* queries;           ///< cu_seqlens_q[B]
  float unit;       ///< 1 / (sqrt(Di) Hkv): of that many queries, f = unit / queries
  float* dq_parts;  ///< [Hkv,T,slots,Di]
  float* dk_parts;  ///< [parts,128,Di]
  float* kl_parts;  ///< [Hkv,T,slots], in units of log2, or null
};

template <int kGroup>
struct KlShared {
  using KeyTile = SharedTile<kBlock, kDim>;
  using QTile = SharedTile<kTileRows, kDim>;
  /// What a step needs beside q. A shift makes the logarithm of a probability of a scaled product;
  /// -inf where there is none.
  struct Step {
    SharedTile<kStepQueries, kDim> q_idx;
    float teacher[kStepQueries * kGroup];
    float student[kStepQueries];
    int seen[kStepQueries];  ///< keys of the block that the query sees
    int part[kStepQueries];  ///< of its entry; -1: no query
  };
  /// What the warpgroups tell each other of a step.
  struct Exchange {
    SharedTile<kStepQueries, kBlock> ds;
    float kl[4 * kWarpgroups][kStepQueries];  ///< of each warp's keys
  };

  KeyTile k, k_idx[kBlockStages];
  QTile q[kTileStages];
  Step step[kStepStages];
  Exchange exchange[2];
  Task task[kBlockStages];  ///< count 0: there are no more
  RingBarriers<1> k_ring;
  RingBarriers<kBlockStages> block_ring;
  RingBarriers<kTileStages> q_ring;
  RingBarriers<kStepStages> step_ring;
  ptx::Barrier exchanged[2];
};

/// One warp: keys, index keys and queries of all tasks of this CTA.
template <int kGroup>
__device__ void load_tasks(KlShared<kGroup>& shared, const KlArgs& args, const CUtensorMap* q_map,
                           const CUtensorMap* k_map, const CUtensorMap* k_idx_map) {
  constexpr int kQueries = kTileRows / kGroup;
  const int lane = threadIdx.x % 32;
  walk::WorkQueue<walk::TaskSource> tasks(args.readers.tasks);
  RingPosition<1> k_at;
  RingPosition<kBlockStages> at;
  RingPosition<kTileStages> tile_at;
  for (Task task = tasks.next(); task.count > 0; task = tasks.next()) {
    at.wait_empty(shared.block_ring);
    if (lane == 0) {
      shared.task[at.stage] = task;
      load_tile(shared.k_idx[at.stage], k_idx_map, &shared.block_ring.full[at.stage], task.source,
                0, 0);
    }
    at.advance();
    k_at.wait_empty(shared.k_ring);
    if (lane == 0) load_tile(shared.k, k_map, &shared.k_ring.full[0], task.source, task.head, 0);
    k_at.advance();

    for (int done = 0; done < task.count; done += 32) {  // a lane per query
      const int row = args.readers.at(task, done + lane).row;
      const int queries = min(32, (task.count - done + kStepQueries - 1) & -kStepQueries);
      for (int first = 0; first < queries; first += kQueries, tile_at.advance()) {
        tile_at.wait_empty(shared.q_ring);
        auto& q = shared.q[tile_at.stage];
        ptx::Barrier* full = &shared.q_ring.full[tile_at.stage];
        if (lane == 0) ptx::arrive_expect(full, q.kBytes);
        __syncwarp();
        const int n = lane - first;  // query of the tile; row -1 lies outside the tensor: zeros
        for (int panel = 0; n >= 0 && n < kQueries && panel < q.kPanels; ++panel)
          ptx::load_box(q.at(n * kGroup, panel * kPanelColumns), q_map, full, panel * kPanelColumns,
                        task.head * kGroup, row, 0);
      }
    }
  }
  at.wait_empty(shared.block_ring);
  if (lane == 0) {
    shared.task[at.stage].count = 0;
    ptx::arrive(&shared.block_ring.full[at.stage]);
  }
}

/// A warp of those that gather. Two lanes for each query of a step.
template <int kGroup>
class Gatherer {
 public:
  using Step = typename KlShared<kGroup>::Step;

  __device__ Gatherer(KlShared<kGroup>& shared, const KlArgs& args, int number)
      : shared_(shared), a_(args), turn_(number) {}

  __device__ void run() {
    RingPosition<kBlockStages> block_at;
    RingPosition<kStepStages> at;
    for (;; block_at.advance()) {
      block_at.wait_full(shared_.block_ring);
      const Task task = shared_.task[block_at.stage];
      if (task.count == 0) return;
      for (int done = 0; done < task.count; done += kStepQueries, at.advance()) {
        const bool mine = turn_ == 0;
        turn_ = mine ? kGatherWarps - 1 : turn_ - 1;
        if (!mine) continue;
        const Reader reader = a_.readers.at(task, done + lane() / 2);
        at.wait_empty(shared_.step_ring);
        Step& step = shared_.step[at.stage];
        gather_query(step, task, reader);
        gather_index_queries(step, task, reader.row);
        ptx::fence_async_proxy();
        ptx::arrive(&shared_.step_ring.full[at.stage]);
      }
      ptx::arrive(&shared_.block_ring.empty[block_at.stage]);
    }
  }

 private:
  static __device__ int lane() { return static_cast<int>(threadIdx.x % 32); }

  __device__ void gather_query(Step& step, const Task& task, const Reader& reader) const {
    constexpr float kLog2Group = kGroup == 16 ? 4 : 3;
    constexpr int kHeads = kGroup / 2;  // of a lane
    const int n = lane() / 2, half = lane() % 2;
    const int64_t row = reader.row;
    const bool exists = row >= 0;
    const float student = exists ? *a_.index_lse.at(row, task.head) : -INFINITY;
    const int64_t head0 = task.head * kGroup + half * kHeads;
    float shift[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) shift[i] = exists ? *a_.lse.at(row, head0 + i) : -INFINITY;
#pragma unroll
    for (int i = 0; i < kHeads; ++i)  // a row without a student has no teacher
      shift[i] = student == -INFINITY || shift[i] == -INFINITY
                     ? -INFINITY
                     : fmaf(less_slack(shift[i]), -kLog2E, -kLog2Group);
#pragma unroll
    for (int i = 0; i < kHeads; i += 4)
      *reinterpret_cast<float4*>(&step.teacher[n * kGroup + half * kHeads + i]) = {
          shift[i], shift[i + 1], shift[i + 2], shift[i + 3]};
    if (half > 0) return;
    step.student[n] = student == -INFINITY ? student : less_slack(student) * -kLog2E;
    step.seen[n] = exists ? walk::keys_seen(task, reader.row) : 0;
    step.part[n] = reader.part;
  }

  /// Half a warp for each row, 16 bytes a lane; four loads under way.
  __device__ void gather_index_queries(Step& step, const Task& task, int row_of_lane) const {
    constexpr int kAtOnce = 4;
    const int half = lane() / 16, unit = lane() % 16;
#pragma unroll 1
    for (int n0 = 0; n0 < kStepQueries; n0 += 2 * kAtOnce) {
      uint4 units[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = __shfl_sync(0xffffffff, row_of_lane, 2 * (n0 + 2 * i + half));
        units[i] = uint4{};
        if (row >= 0)
          units[i] = *reinterpret_cast<const uint4*>(a_.q_idx.at(row, task.head) + unit * 8);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        *reinterpret_cast<uint4*>(step.q_idx.at(n0 + 2 * i + half, unit * 8)) = units[i];
    }
  }

  KlShared<kGroup>& shared_;
  const KlArgs& a_;
  int turn_;  ///< steps until the next one of this warp
};

}  // namespace msa::cuda::sm90::kl
