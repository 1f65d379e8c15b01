// The list of blocks that a cluster attends: given, or chosen here.
#pragma once

#include <cstdint>

#include "cuda/sm90/decode/attend_shared.cuh"
#include "cuda/sm90/decode/token.cuh"

namespace msa::cuda::sm90::decode {

/// winners = the token's best blocks, in every CTA of the cluster. All consumers.
__device__ inline void choose_blocks(AttendShared& shared, const AttendArguments& a,
                                     const float* scores, const Split& split) {
  TopK& select = shared.select();
  const int blocks = shared.choices.visible, i = static_cast<int>(threadIdx.x);
  const auto key = [&](float score, int j) {
    return key_of(shared.choices.is_forced(j) ? kForcedOrder : order_of(score), j);
  };
  const bool divided = split.divides(blocks, a.selection.topk);
  const int share = divided ? split.share(blocks) : blocks;
  const int first = divided ? min(split.rank * share, blocks) : 0;
  select.choose(scores, first, min(first + share, blocks), divided ? TopK::kBest : a.selection.topk,
                key);
  if (divided)
    select.exchange(shared.winners, a.selection.topk, split.parts, &shared.met, &shared.known);
  else if (i < kMaxChosen)
    shared.winners[i] = select.best[i];
  ptx::fence_async_proxy();  // the scratch becomes a stage of the ring
}

/// Lists the blocks `id` of one warp's lanes, -1 for none. Entries of other shards, behind the last
/// visible key and without a page are left out.
__device__ inline void list_blocks(AttendShared& shared, const DeviceBatch& batch,
                                   const Token& token, int id) {
  const int lane = threadIdx.x % 32;
  const int j = id - token.sequence.block0;
  const bool seen = id >= 0 && j >= 0 && j < token.blocks();
  const int page = seen ? batch.page(token.sequence, j) : -1;
  const uint32_t kept = __ballot_sync(0xffffffff, page >= 0);
  if (page >= 0) {
    shared.list[__popc(kept & ((1u << lane) - 1))] = {
        .page = page, .visible = min(kBlock, token.visible - j * kBlock)};
  }
  if (lane == 0) shared.listed = __popc(kept);
}

}  // namespace msa::cuda::sm90::decode
