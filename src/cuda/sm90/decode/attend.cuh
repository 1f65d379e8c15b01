// Attention of one new token over its list of blocks, all heads of one KV head at once.
//
// A cluster of CTAs shares the list of one (token, KV head); each walks its share of the blocks and
// keeps a partial softmax. At the end every CTA finishes 16 / cluster size of the 16 rows: the
// others send their part of these rows straight into its shared memory. No trip through device
// memory, no workspace, and a fixed order of sums. A CTA waits for all that is sent to it, and what
// it sends comes from registers: none has to outlive its own work.
#pragma once

#include <cstdint>

#include "cuda/block_list.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/sm90/decode/attend_list.cuh"
#include "cuda/sm90/decode/attend_parts.cuh"
#include "cuda/sm90/decode/attend_shared.cuh"
#include "cuda/sm90/decode/tiles.cuh"
#include "cuda/sm90/decode/token.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"

namespace msa::cuda::sm90::decode {

/// Grid [cluster size * T, Hkv], clusters along x. The blocks are those of a.ids, or with kChoose
/// the best by a.scores.
template <bool kChoose>
__global__ void __launch_bounds__(kThreads, 2) attend(const __grid_constant__ AttendArguments a) {
  auto& shared = *reinterpret_cast<AttendShared*>(ptx::dynamic_shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Split split = Split::of_cluster();
  const int t = static_cast<int>(ptx::cluster_id()), head = static_cast<int>(blockIdx.y);
  const int64_t ids_at = a.ids.offset(t, head);
  RingPosition<kStages> position;

  // What does not depend on the list: barriers, queries, what the token sees.
  Token token{};
  int id = -1;  // the producer's: its lane's entry of the list
  if (warp == kWarps) {
    if constexpr (!kChoose) {
      ptx::wait_for_previous_grid();
      if (lane < a.selection.topk) id = a.ids.data[ids_at + lane];
    }
    if (lane == 0) {
      for (ptx::Barrier* barrier : {&shared.q_full, &shared.parts_full, &shared.met, &shared.known})
        ptx::init_barrier(barrier, 1);
      shared.barriers.init(kWarps);
      ptx::fence_barrier_init();
      ptx::arrive_expect(&shared.parts_full, split.parts * split.own_rows(a.group) * sizeof(Part));
      ptx::arrive_expect(&shared.q_full, a.group * kDim * sizeof(__nv_bfloat16));
      load_panels(shared.q, &a.q, &shared.q_full, head * a.group, t, 0);
      ptx::prefetch_map(&a.k);
      ptx::prefetch_map(&a.v);
    }
    __syncwarp();
    token = find_token(a.batch, t);
    if (lane == 0) shared.choices = token.choices(a.selection, a.columns, a.batch.causal);
  }
  __syncwarp();
  ptx::arrive_cluster();
  ptx::wait_cluster();
  __syncthreads();

  // The list: every CTA of the cluster has all of it and takes its share.
  BlockKey best = kNoBlock;
  if constexpr (kChoose) {
    ptx::wait_for_previous_grid();
    if (warp < kWarps)
      choose_blocks(shared, a, a.scores + (int64_t{t} * gridDim.y + head) * a.columns, split);
    __syncthreads();
    // Who reads what other CTAs sent waits for it.
    if (split.divides(shared.choices.visible, a.selection.topk)) ptx::wait(&shared.known, 0);
    if (lane < kMaxChosen) best = shared.winners[lane];
    if (lane < min(a.selection.topk, shared.choices.visible))
      id = token.sequence.block0 + id_of(best);
  }
  ptx::allow_next_grid();
  if (warp == kWarps) {
    if (!kChoose && !counts<32>(id)) id = -1;
    list_blocks(shared, a.batch, token, (lane & (split.parts - 1)) == split.rank ? id : -1);
  }
  __syncthreads();
  if (kChoose && warp == 0 && split.rank == 0 && a.ids.data != nullptr)
    write_list(best, min(shared.choices.visible, a.selection.topk), a.selection.topk,
               shared.choices.block0, a.ids.data + ids_at, nullptr);

  // Producer.
  if (warp == kWarps) {
#pragma unroll 1
    for (int i = 0; lane == 0 && i < 2 * shared.listed; ++i, position.advance()) {
      position.wait_empty(shared.barriers);
      load_tile(shared.ring[position.stage], i % 2 == 0 ? &a.k : &a.v,
                &shared.barriers.full[position.stage], 0, head, shared.list[i / 2].page);
    }
    return;
  }

  // Consumers.
  Operand q;
  ptx::wait(&shared.q_full, 0);
  load_rows(q, shared.q);
  OnlineSoftmax softmax;
  float o[8] = {};
  const auto next_stage = [&] {
    release(&shared.barriers.empty[position.stage]);
    position.advance();
  };
  for (int i = 0; i < shared.listed; ++i) {
    const int visible = shared.list[i].visible;

    // S = Q K^T, each warp 16 keys.
    Operand operand;
    float s[8] = {}, max[2], factor[2];
    position.wait_full(shared.barriers);
    load_keys(operand, shared.ring[position.stage], warp * kKeysPerWarp);
    next_stage();
    multiply(s, q, operand);
    if (visible < kBlock) {
      const int limit = visible - warp * kKeysPerWarp;
      mask_columns(s, {limit, limit});
    }

    // P = exp(S - max).
    row_max(s, max);
    share_max(shared, max);
    softmax.absorb(s, max, a.scale, factor);
    scale_rows(o, factor);

    share_probabilities(shared, s);

    // O += P V, each warp 16 columns.
    position.wait_full(shared.barriers);
    KeyTile& v = shared.ring[position.stage];
    if (visible < kBlock) clear_rows<kConsumers>(v, visible, kConsumerBarrier);
    load_values(operand, v, warp * kColumnsPerWarp);
    next_stage();
    multiply(o, shared.q, operand);
  }

  exchange_parts(shared, shared.outgoing(position.stage), o, softmax, a.group, split);
#pragma unroll 1
  for (int row = warp; row < split.own_rows(a.group); row += kWarps)
    finish_row(shared, a, t, int64_t{head} * a.group + split.slot(split.rank, row), row, split);
}

}  // namespace msa::cuda::sm90::decode
