// Attention of one new token over its list of blocks, all heads of one KV head at once.
//
// A cluster of CTAs shares the list of one (token, KV head); each walks its share of the blocks and
// keeps a partial softmax. At the end every CTA finishes 16 / cluster size of the 16 rows: the
// others send their part of these rows straight into its shared memory. No trip through device
// memory, no workspace, and a fixed order of sums. A CTA waits for all that is sent to it, and what
// it sends comes from registers: none has to outlive its own work.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cmath>
#include <cstdint>

#include "cuda/block_list.cuh"
#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/cluster.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/rows.h"
#include "cuda/sm90/decode/select.cuh"
#include "cuda/sm90/decode/tiles.cuh"
#include "cuda/sm90/decode/token.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/store_rows.cuh"

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
  int32_t init_blocks, local_blocks;
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
  Choice choice;
  Key winners[kMaxChosen];  // the token's list, if it is chosen here
  ptx::Barrier q_full, parts_full, met, known;
  RingBarriers<kStages> barriers;

  /// Before the first load.
  __device__ SelectScratch& select() {
    static_assert(sizeof(SelectScratch) <= sizeof(KeyTile));
    return reinterpret_cast<SelectScratch&>(ring[kStages - 1]);
  }
  /// To other CTAs, behind the last block, where `stage` is the one that would be used next.
  __device__ Part* outgoing(int stage) {
    static_assert(sizeof(Part[kRows]) <= sizeof(KeyTile));
    return reinterpret_cast<Part*>(&ring[stage]);
  }
};
static_assert(2 * (sizeof(AttendShared) + 1024) <= 228 * 1024, "two CTAs fit on an SM");

/// Rows from `first` on become zero, so that what lies behind the last key cannot reach P V: 0 *
/// NaN is NaN. All consumers.
__device__ inline void clear_rows(KeyTile& tile, int first) {
  constexpr int kUnits = kPanelColumns / 8;  // of 16 bytes, in a panel's row
  for (int i = first * kUnits + static_cast<int>(threadIdx.x); i < kBlock * kUnits;
       i += kConsumers) {
    for (int p = 0; p < KeyTile::kPanels; ++p)
      reinterpret_cast<uint4*>(tile.panel(p))[i] = uint4{0, 0, 0, 0};
  }
  ptx::fence_async_proxy();
  join_consumers();
}

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

/// winners = the token's best blocks, in every CTA of the cluster. All consumers.
__device__ inline void choose_blocks(AttendShared& shared, const AttendArguments& a,
                                     const float* scores, const Split& split) {
  SelectScratch& select = shared.select();
  const int blocks = shared.choice.blocks, i = static_cast<int>(threadIdx.x);
  const auto key_of = [&](float score, int j) {
    return make_key(score, j, shared.choice.forced(j, a.init_blocks, a.local_blocks));
  };
  const bool divided = split.divides(blocks, a.topk);
  const int share = divided ? split.share(blocks) : blocks;
  const int first = divided ? min(split.rank * share, blocks) : 0;
  select.choose(scores, first, min(first + share, blocks), divided ? SelectScratch::kBest : a.topk,
                key_of);
  if (divided)
    select.exchange(shared.winners, a.topk, split.parts, &shared.met, &shared.known);
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

/// The maximum of every row over all consumers, from that over each warp's keys.
__device__ inline void share_max(AttendShared& shared, float (&max)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = lane / 4;
  if (lane % 4 == 0) {
    shared.block_max[row][warp] = max[0];
    shared.block_max[row + 8][warp] = max[1];
  }
  join_consumers();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const auto* four = reinterpret_cast<const float4*>(shared.block_max[row + 8 * h]);
    const float4 a = four[0], b = four[1];
    max[h] =
        fmaxf(fmaxf(fmaxf(a.x, a.y), fmaxf(a.z, a.w)), fmaxf(fmaxf(b.x, b.y), fmaxf(b.z, b.w)));
  }
}

/// Stores 16 keys of probabilities where all warps find them.
__device__ inline void share_probabilities(AttendShared& shared, const float (&s)[8]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint32_t p[1][4];
  pack_operand(s, p);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint32_t*>(shared.q.at(
        lane / 4 + i % 2 * 8, warp * kKeysPerWarp + i / 2 * 8 + lane % 4 * 2)) = p[0][i];
  }
  join_consumers();
}

/// Hands this CTA's part of every row to the CTA that finishes it, and waits for what it gets. All
/// consumers.
__device__ inline void exchange_parts(AttendShared& shared, Part* outgoing, const float (&o)[8],
                                      const OnlineSoftmax& softmax, int group, const Split& split) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    Part& part = (split.parts > 1 ? outgoing : shared.parts)[lane / 4 + 8 * h];
    for (int j = 0; j < 2; ++j)
      *reinterpret_cast<float2*>(&part.o[warp * kColumnsPerWarp + 8 * j + lane % 4 * 2]) = {
          o[4 * j + 2 * h], o[4 * j + 2 * h + 1]};
    float sum = softmax.sum[h];
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (lane % 4 == 0) part.sum[warp] = sum;
    if (lane % 4 == 0 && warp == 0) part.max = softmax.max[h];
  }
  join_consumers();
  if (split.parts == 1) return;
  // Half a warp per row. Not as a bulk copy: compute-sanitizer objects to one into the CTA itself.
  const int row = 2 * warp + lane / 16;
  auto* to =
      reinterpret_cast<uint4*>(&shared.parts[split.slot(split.rank, row & (split.rows() - 1))]);
  const auto* from = reinterpret_cast<const uint4*>(&outgoing[row]);
  for (int i = lane % 16; row < group && i < static_cast<int>(sizeof(Part) / 16); i += 16)
    ptx::store_to_cta(row >> split.row_bits, to + i, from[i], &shared.parts_full);
  __syncwarp();
  ptx::wait(&shared.parts_full, 0);
}

/// Combines the parts of this CTA's row `row` and writes it as head h of token t. One warp, four
/// columns per lane.
__device__ inline void finish_row(const AttendShared& shared, const AttendArguments& a, int64_t t,
                                  int64_t h, int row, const Split& split) {
  const int lane = threadIdx.x % 32;
  // Lane p weighs part p.
  float part_max = -INFINITY, part_sum = 0;
  if (lane < split.parts) {
    const Part& part = shared.parts[split.slot(lane, row)];
    part_max = part.max;
    for (float sum : part.sum) part_sum += sum;
  }
  float max = part_max;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, i));
  const float weight = part_sum == 0 ? 0 : ptx::exp2_fast(part_max - max);
  float sum = weight * part_sum;
#pragma unroll
  for (int i = 16; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffff, sum, i);

  float o[4] = {};
#pragma unroll 4
  for (int p = 0; p < split.parts; ++p) {
    const float factor = __shfl_sync(0xffffffff, weight, p);
    const float4 part = reinterpret_cast<const float4*>(shared.parts[split.slot(p, row)].o)[lane];
    o[0] += factor * part.x;
    o[1] += factor * part.y;
    o[2] += factor * part.z;
    o[3] += factor * part.w;
  }
  const bool seen = sum != 0;  // it may be NaN, as a score is
  const float inverse = seen ? __fdividef(1, sum) : 0;
  for (float& x : o) x *= inverse;

  const float4 columns{o[0], o[1], o[2], o[3]};
  const int64_t at = a.o.offset(t, h) + 4 * lane;
  if (a.o_is_f32)
    store_columns(columns, static_cast<float*>(a.o.data) + at);
  else
    store_columns(columns, static_cast<__nv_bfloat16*>(a.o.data) + at);
  if (a.lse.data != nullptr && lane == 0)
    *a.lse.at(t, h) = seen ? lse_of(max, sum, a.scale) : -INFINITY;
}

/// Grid [cluster size * T, Hkv], clusters along x. The blocks are those of a.ids, or with kChoose
/// the best by a.scores.
template <bool kChoose>
__global__ void __launch_bounds__(kThreads, 2) attend(const __grid_constant__ AttendArguments a) {
  extern __shared__ __align__(1024) unsigned char memory[];
  AttendShared& shared = *reinterpret_cast<AttendShared*>(memory);
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
      if (lane < a.topk) id = a.ids.data[ids_at + lane];
    }
    if (lane == 0) {
      for (ptx::Barrier* barrier : {&shared.q_full, &shared.parts_full, &shared.met, &shared.known})
        ptx::init_barrier(barrier, 1);
      shared.barriers.init(kWarps);
      ptx::fence_barrier_init();
      ptx::arrive_expect(&shared.parts_full, split.parts * split.own_rows(a.group) * sizeof(Part));
      ptx::arrive_expect(&shared.q_full, a.group * kDim * sizeof(__nv_bfloat16));
      for (int p = 0; p < RowTile::kPanels; ++p)
        ptx::load_box(shared.q.panel(p), &a.q, &shared.q_full, p * kPanelColumns, head * a.group, t,
                      0);
      ptx::prefetch_map(&a.k);
      ptx::prefetch_map(&a.v);
    }
    __syncwarp();
    token = find_token(a.batch, t);
    if (lane == 0) shared.choice = token.choice(a.columns, a.batch.causal);
  }
  __syncwarp();
  ptx::arrive_cluster();
  ptx::wait_cluster();
  __syncthreads();

  // The list: every CTA of the cluster has all of it and takes its share.
  Key best = 0;
  if constexpr (kChoose) {
    ptx::wait_for_previous_grid();
    if (warp < kWarps)
      choose_blocks(shared, a, a.scores + (int64_t{t} * gridDim.y + head) * a.columns, split);
    __syncthreads();
    // Who reads what other CTAs sent waits for it.
    if (split.divides(shared.choice.blocks, a.topk)) ptx::wait(&shared.known, 0);
    if (lane < kMaxChosen) best = shared.winners[lane];
    if (lane < min(a.topk, shared.choice.blocks)) id = token.sequence.block0 + block_of(best);
  }
  ptx::allow_next_grid();
  if (warp == kWarps) {
    if (!kChoose && !counts<32>(id)) id = -1;
    list_blocks(shared, a.batch, token, (lane & (split.parts - 1)) == split.rank ? id : -1);
  }
  __syncthreads();
  if (kChoose && warp == 0 && split.rank == 0 && a.ids.data != nullptr)
    write_list(shared.choice, best, a.topk, a.ids.data + ids_at, nullptr);

  // Producer.
  if (warp == kWarps) {
#pragma unroll 1
    for (int i = 0; lane == 0 && i < 2 * shared.listed; ++i, position.advance()) {
      position.wait_empty(shared.barriers);
      ptx::Barrier* full = &shared.barriers.full[position.stage];
      ptx::arrive_expect(full, KeyTile::kBytes);
      for (int p = 0; p < KeyTile::kPanels; ++p)
        ptx::load_box(shared.ring[position.stage].panel(p), i % 2 == 0 ? &a.k : &a.v, full,
                      p * kPanelColumns, 0, head, shared.list[i / 2].page);
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
    if (visible < kBlock) clear_rows(v, visible);
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
