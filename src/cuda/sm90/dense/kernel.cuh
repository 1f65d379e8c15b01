// Dense attention on Hopper: one producer warp feeds tiles of Q, K and V by TMA, each consumer
// warpgroup keeps 64 query rows in registers. The structure is FlashAttention-3's (Shah et al.,
// arXiv 2407.08608) without its turns at the tensor cores: Q K^T of the next block is started
// before the softmax of this one, which hides behind those products and the other consumer's.
#pragma once

#include "cuda/ptx/barrier.cuh"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/dense/config.h"
#include "cuda/sm90/dense/schedule.cuh"
#include "cuda/tile/load_tile.cuh"
#include "cuda/tile/online_softmax.cuh"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"
#include "cuda/tile/store_rows.cuh"

namespace msa::cuda::sm90::dense {

template <int kConsumers>
struct Shared {
  SharedTile<kTileRows * kConsumers, kDim> q;
  SharedTile<kBlock, kDim>
      kv[kStages];    // K of the last block, then K of the next and V of this ...
  int keys[kStages];  // rows of a K tile that are keys; 0: no such page
  Segment segment;    // what q belongs to
  RingBarriers<1> q_ring;
  RingBarriers<kStages> kv_ring;
};
static_assert(sizeof(Shared<2>) <= 227 * 1024, "shared memory of one SM");

struct Maps {
  CUtensorMap q, k, v;
};

// ---- the producer: one warp ---------------------------------------------------------------------

/// Where the blocks of a sequence lie, asked for in descending order. Page numbers are fetched 32
/// at a time, one batch ahead.
class BlockPlaces {
 public:
  __device__ BlockPlaces(const DeviceBatch& batch, const DeviceSequence& s, int last)
      : batch_(batch), sequence_(s), top_(last - 1), pages_(fetch(0)), ahead_(fetch(32)) {}

  struct Place {
    int token, page;  ///< coordinates of the tensor map
    int keys;         ///< rows that hold keys
  };
  /// Block j, the one below the block of the call before.
  __device__ Place next(int j) {
    const int i = top_ - j;
    const int keys = min(sequence_.kv_len - j * kBlock, kBlock);
    if (sequence_.pages == nullptr) return {sequence_.k_begin + j * kBlock, 0, keys};
    if (i > 0 && i % 32 == 0) {
      pages_ = ahead_;
      ahead_ = fetch(i + 32);
    }
    const int page = __shfl_sync(0xffffffff, pages_, i % 32);
    return {0, page, page < 0 ? 0 : keys};  // a box outside the tensor arrives as zeros
  }

 private:
  __device__ int fetch(int i) const {
    const int j = top_ - i - static_cast<int>(threadIdx.x % 32);
    return sequence_.pages != nullptr && j >= 0 ? batch_.page(sequence_, j) : -1;
  }
  const DeviceBatch& batch_;
  const DeviceSequence& sequence_;
  int top_;
  int pages_, ahead_;
};

template <int kConsumers>
__device__ void produce(Shared<kConsumers>& shared, const Maps& maps, const Args& args) {
  for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v}) ptx::prefetch_map(map);
  Schedule schedule(args);
  RingPosition<1> q;
  RingPosition<kStages> kv;
  while (true) {
    DeviceSequence sequence;
    const Segment segment = schedule.next(args, &sequence);
    if (ptx::elect_one()) {
      q.wait_empty(shared.q_ring);
      shared.segment = segment;
      ptx::Barrier* full = &shared.q_ring.full[q.stage];
      if (segment.tokens == 0) {
        ptx::arrive(full);
      } else {
        ptx::arrive_expect(full, args.tile_tokens * args.group * kDim * 2);
        load_panels(shared.q, &maps.q, full, segment.kv_head * args.group, segment.row, 0);
      }
    }
    q.advance();
    if (segment.tokens == 0) return;

    BlockPlaces places(args.batch, sequence, segment.last);
    const auto load = [&](const CUtensorMap& map, const BlockPlaces::Place& place) {
      if (ptx::elect_one()) {
        kv.wait_empty(shared.kv_ring);
        shared.keys[kv.stage] = place.keys;
        ptx::Barrier* full = &shared.kv_ring.full[kv.stage];
        auto& tile = shared.kv[kv.stage];
        load_tile(tile, &map, full, place.token, segment.kv_head, place.page);
      }
      kv.advance();
    };
    BlockPlaces::Place above{};
    for (int j = segment.last - 1; j >= segment.first; --j) {
      const BlockPlaces::Place place = places.next(j);
      load(maps.k, place);
      if (j + 1 < segment.last) load(maps.v, above);
      above = place;
    }
    if (segment.first < segment.last) load(maps.v, above);
  }
}

// ---- the consumers: one warpgroup each ----------------------------------------------------------

/// Named barriers: one per consumer, and that of all consumers; 0 is __syncthreads.
constexpr uint32_t kConsumerBarrier = 1, kConsumersBarrier = 3;

/// Whether any of eight bf16 is a NaN or an infinity: an exponent of ones carries into the sign.
__device__ inline bool any_special(const uint4& eight) {
  uint32_t carries = 0;
  for (const uint32_t pair : {eight.x, eight.y, eight.z, eight.w})
    carries |= (pair & 0x7f807f80) + 0x00800080;
  return (carries & 0x80008000) != 0;
}
/// The eight without those.
__device__ inline uint4 without_special(uint4 eight) {
  for (uint32_t* pair : {&eight.x, &eight.y, &eight.z, &eight.w}) {
    const uint32_t carries = ((*pair & 0x7f807f80) + 0x00800080) & 0x80008000;
    *pair &= ~((carries >> 15) * 0xffff);
  }
  return eight;
}

/// A block of V that not all tokens of the tile see, as a consumer does before it adds the block:
/// in P V all rows are multiplied with all keys, and no product with a probability of zero may be
/// NaN. OwnRows from `keys` on hold whatever lay there and become zeros. NaN and infinities of the
/// others are seldom: then, all consumers together, rows from `end` on, which no token sees, become
/// zeros too, and of those before, from `begin` on, such values are taken out, and added to o by
/// hand where this thread's rows see them, keys below limit[h].
template <int kConsumers>
__device__ inline void isolate_values(SharedTile<kBlock, kDim>& v, int begin, int end, int keys,
                                      const int (&limit)[2], float (&o)[kDim / 2], int consumer) {
  constexpr int kUnits = kDim / 8, kAll = 128 * kConsumers;
  const int thread = static_cast<int>(threadIdx.x % 128);
  const auto unit = [&](int i) {
    return reinterpret_cast<uint4*>(v.at(i / kUnits, i % kUnits * 8));
  };
#pragma unroll 1
  for (int i = keys * kUnits + thread; i < kBlock * kUnits; i += 128) *unit(i) = {};
  bool special = false;
#pragma unroll 1
  for (int i = begin * kUnits + thread; i < keys * kUnits; i += 128)
    special = any_special(*unit(i)) || special;
  ptx::fence_async_proxy();
  if (!ptx::join_any(kConsumerBarrier + consumer, 128, special)) return;

  ptx::join(kConsumersBarrier, kAll);  // all have found them
#pragma unroll 1
  for (int key = begin; key < end; ++key) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) {
      const int column = 8 * (i / 4) + 2 * static_cast<int>(threadIdx.x % 4) + i % 2;
      const float x = __bfloat162float(*v.at(key, column));
      if (key < limit[i / 2 % 2] && (isnan(x) || isinf(x))) o[i] += x;
    }
  }
  ptx::join(kConsumersBarrier, kAll);
#pragma unroll 1
  for (int i = begin * kUnits + consumer * 128 + thread; i < keys * kUnits; i += kAll)
    *unit(i) = i < end * kUnits ? without_special(*unit(i)) : uint4{};
  ptx::fence_async_proxy();
  ptx::join(kConsumersBarrier, kAll);
}

/// The thread's two rows of the tile, their place in the outputs and what they see.
struct OwnRows {
  int64_t token[2];  ///< query row, -1: no row
  int head[2];
  int limit[2];         ///< visible keys
  int row[2];           ///< in the tile
  float* block_max[2];  ///< null where this thread writes none

  __device__ OwnRows(const Args& args, const Segment& segment, int consumer) {
    const int thread = static_cast<int>(threadIdx.x % 128);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      row[h] = consumer * kTileRows + thread / 32 * 16 + thread % 32 / 4 + 8 * h;
      const int i = row[h] / args.group;
      token[h] = i < segment.tokens ? segment.row + i : -1;
      head[h] = segment.kv_head * args.group + row[h] % args.group;
      limit[h] = segment.limit(i);
      const bool writes = args.block_max.data != nullptr && thread % 4 == 0 && token[h] >= 0;
      block_max[h] = writes ? args.block_max.at(token[h], head[h]) : nullptr;
    }
  }
};

template <int kConsumers>
__device__ void write_results(const Args& args, const Segment& segment, const OwnRows& rows,
                              const float (&o)[kDim / 2], const OnlineSoftmax& softmax,
                              const float (&lse)[2]) {
  const bool leader = threadIdx.x % 4 == 0;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const bool real = rows.token[h] >= 0;
    if (segment.slot >= 0) {
      const int64_t part = int64_t{segment.slot} * kTileRows * kConsumers + rows.row[h];
      store_row(o, h, real ? args.o_parts + part * kDim : nullptr);
      if (real && leader) args.softmax_parts[part] = {softmax.max[h], softmax.sum[h]};
      continue;
    }
    if (args.o.data != nullptr)
      store_row(o, h, real ? args.o.at(rows.token[h], rows.head[h]) : nullptr);
    else
      store_row(o, h, real ? args.o_wide.at(rows.token[h], rows.head[h]) : nullptr);
    if (real && leader && args.lse.data != nullptr)
      *args.lse.at(rows.token[h], rows.head[h]) = lse[h];
  }
}

template <int kConsumers>
__device__ void consume(Shared<kConsumers>& shared, const Args& args, int consumer) {
  RingPosition<1> q;
  RingPosition<kStages> kv;
  while (true) {
    q.wait_full(shared.q_ring);
    const Segment segment = shared.segment;
    if (segment.tokens == 0) return;
    const OwnRows rows(args, segment, consumer);

    float s[kBlock / 2], o[kDim / 2] = {}, factor[2];
    uint32_t p[kBlock / 16][4];
    OnlineSoftmax softmax;
    // Scores of block j become probabilities.
    const auto weigh = [&](int j, int keys) {
      if ((j + 1) * kBlock > segment.visible || (j + 1) * kBlock > segment.kv_len || keys == 0) {
        const int limit[2] = {keys > 0 ? rows.limit[0] - j * kBlock : 0,
                              keys > 0 ? rows.limit[1] - j * kBlock : 0};
        mask_columns(s, limit);
      }
      float block_max[2];
      row_max(s, block_max);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (rows.block_max[h] != nullptr && j < args.block_columns)
          rows.block_max[h][j] = block_max[h];
      softmax.absorb(s, block_max, args.scale, factor);
    };
    // Whether all tokens of the tile see all of block j.
    const auto all_see = [&](int j) { return (j + 1) * kBlock <= segment.limit(0); };
    // Adds block j.
    const auto add = [&](const RingPosition<kStages>& v, int j, bool may_hide) {
      if (may_hide && !all_see(j)) {
        const int begin = max(segment.limit(0) - j * kBlock, 0);
        const int end = min(segment.limit(segment.tokens - 1) - j * kBlock, kBlock);
        const int keys = min(segment.kv_len - j * kBlock, kBlock);
        const int limit[2] = {rows.limit[0] - j * kBlock, rows.limit[1] - j * kBlock};
        isolate_values<kConsumers>(shared.kv[v.stage], begin, end, keys, limit, o, consumer);
      }
      ptx::wgmma_fence();
      add_values(o, p, shared.kv[v.stage]);
      ptx::wgmma_commit();
    };
    const auto score = [&](const RingPosition<kStages>& k) {
      ptx::wgmma_fence();
      score_keys(s, shared.q, consumer * kTileRows, shared.kv[k.stage]);
      ptx::wgmma_commit();
    };

    if (segment.first < segment.last) {
      kv.wait_full(shared.kv_ring);
      const int keys = read_for_warp(shared.keys[kv.stage]);
      score(kv);
      ptx::wgmma_wait<0>();
      ptx::pin(s);
      release(&shared.kv_ring.empty[kv.stage]);
      kv.advance();
      weigh(segment.last - 1, keys);
      pack_operand(s, p);

      // Scores of block j; values of block j + 1.
      const auto step = [&](int j, bool may_hide) {
        const RingPosition<kStages> k = kv;
        kv.advance();
        const RingPosition<kStages> v = kv;
        kv.advance();

        k.wait_full(shared.kv_ring);
        score(k);
        v.wait_full(shared.kv_ring);
        add(v, j + 1, may_hide);
        const int keys = read_for_warp(shared.keys[k.stage]);

        ptx::wgmma_wait<1>();
        ptx::pin(s);
        release(&shared.kv_ring.empty[k.stage]);
        weigh(j, keys);
        // Seldom, once the first blocks are seen. Without a branch here, the assembler waits for
        // P V before the exponentials.
        if (__any_sync(0xffffffff, factor[0] != 1 || factor[1] != 1)) {
          ptx::wgmma_wait<0>();
          ptx::pin(o);
          scale_rows(o, factor);
        }

        ptx::wgmma_wait<0>();
        ptx::pin(o);
        release(&shared.kv_ring.empty[v.stage]);
        pack_operand(s, p);
      };
      // Two loops: a test in the long one would keep its products apart.
      int j = segment.last - 2;
      for (; j >= segment.first && !all_see(j + 1); --j) step(j, /*may_hide=*/true);
      for (; j >= segment.first; --j) step(j, /*may_hide=*/false);
      ptx::arrive(&shared.q_ring.empty[q.stage]);

      kv.wait_full(shared.kv_ring);
      add(kv, segment.first, /*may_hide=*/true);
      ptx::wgmma_wait<0>();
      ptx::pin(o);
      release(&shared.kv_ring.empty[kv.stage]);
      kv.advance();
    } else {
      ptx::arrive(&shared.q_ring.empty[q.stage]);
    }
    q.advance();

    float inverse[2], lse[2];
    softmax.finish(args.scale, inverse, lse);
    scale_rows(o, inverse);
    write_results<kConsumers>(args, segment, rows, o, softmax, lse);
    const int blocks = blocks_of(segment.limit(segment.tokens - 1));
#pragma unroll
    for (int h = 0; h < 2; ++h)  // behind what the tile sees
      for (int j = blocks; segment.top && rows.block_max[h] != nullptr && j < args.block_columns;
           ++j)
        rows.block_max[h][j] = -INFINITY;
  }
}

// ---- kernels ------------------------------------------------------------------------------------

/// OwnRows behind the last sequence: zeros, -inf. One warp.
__device__ inline void clear_padding(const Args& args) {
  const DeviceBatch& batch = args.batch;
  const int heads = args.heads_kv * args.group, lane = static_cast<int>(threadIdx.x % 32);
  for (int t = batch.clamp(batch.cu_seqlens_q[batch.sequences], 0, batch.tokens); t < batch.tokens;
       ++t) {
    for (int h = static_cast<int>(blockIdx.x); h < heads; h += static_cast<int>(gridDim.x)) {
      for (int d = lane; d < kDim; d += 32) {
        if (args.o.data != nullptr)
          args.o.at(t, h)[d] = __float2bfloat16(0);
        else
          args.o_wide.at(t, h)[d] = 0;
      }
      if (lane == 0 && args.lse.data != nullptr) *args.lse.at(t, h) = -INFINITY;
      for (int j = lane; j < args.block_columns; j += 32) args.block_max.at(t, h)[j] = -INFINITY;
    }
  }
}

/// Grid: any number of CTAs up to kMaxCtas, one per SM. Warpgroup 0 produces.
template <int kConsumers>
__global__ void __launch_bounds__(128 * (kConsumers + 1), 1)
    attend(const __grid_constant__ Maps maps, const __grid_constant__ Args args) {
  auto& shared = *reinterpret_cast<Shared<kConsumers>*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    shared.q_ring.init(128 * kConsumers);  // every thread: each reads the segment
    shared.kv_ring.init(4 * kConsumers);   // one arrival per warp
    ptx::fence_barrier_init();
  }
  __syncthreads();
  ptx::allow_next_grid();

  const int warpgroup = __shfl_sync(0xffffffff, static_cast<int>(threadIdx.x / 128), 0);  // uniform
  if (warpgroup == 0) {
    if constexpr (kConsumers == 2) ptx::give_registers<56>();
    if (threadIdx.x < 32)
      produce(shared, maps, args);
    else if (threadIdx.x < 64)
      clear_padding(args);
  } else {
    if constexpr (kConsumers == 2) ptx::take_registers<224>();
    consume(shared, args, warpgroup - 1);
  }
}

/// Combines the parts of the units that several CTAs computed, in the order of the CTAs. One warp
/// per row (t, h); `ctas` and `tile_rows` are attend's.
__global__ void __launch_bounds__(128)
    merge_parts(const __grid_constant__ Args args, int ctas, int tile_rows) {
  const int heads = args.heads_kv * args.group;
  const int warp = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int t = warp / heads, head = warp % heads;
  const int b = t < args.batch.tokens ? args.batch.warp_sequence_of(t) : -1;

  // CTAs first .. last took steps of the row's unit.
  int64_t total = 0;
  int first = 0, last = 0, row = 0;
  if (b >= 0) {
    const Cut c = cut(args, b);
    const int token = t - args.batch.sequence(b).q_begin;
    const int64_t unit =
        int64_t{head / args.group} * c.tiles + (c.tiles - 1 - token / args.tile_tokens);
    const int64_t begin = steps_before(args, b) + unit * c.unit;
    total = steps_before(args, args.batch.sequences);
    first = share_owner(total, begin, ctas);
    last = share_owner(total, begin + c.unit - 1, ctas);
    row = token % args.tile_tokens * args.group + head % args.group;
  }
  const auto part = [&](int cta) {
    return int64_t{part_slot(cta, cta == first)} * tile_rows + row;
  };
  const auto softmax_of = [&](int cta) {
    const bool written =
        cta <= last && share_begin(total, cta, ctas) < share_begin(total, cta + 1, ctas);
    return written ? args.softmax_parts[part(cta)] : PartSoftmax{-INFINITY, 0};
  };
  ptx::wait_for_previous_grid();
  if (first == last) return;  // no row, or one CTA had it all

  float max = -INFINITY;
  for (int cta = first + lane; cta <= last; cta += 32) max = fmaxf(max, softmax_of(cta).max);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2)
    max = fmaxf(max, __shfl_xor_sync(0xffffffff, max, lanes));
  constexpr int kAtOnce = 8;  // loads in flight
  float weight = 0;
  float4 o{};
  for (int base = first; base <= last; base += 32) {
    const PartSoftmax own = softmax_of(base + lane);
    const float mine =  // may be NaN
        own.sum == 0 ? 0 : own.sum * ptx::exp2_fast(own.max - max);
    for (int begin = 0; begin < 32 && base + begin <= last; begin += kAtOnce) {
      float w[kAtOnce];
      float4 x[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        w[i] = __shfl_sync(0xffffffff, mine, begin + i);
        const int cta = w[i] != 0 ? base + begin + i : first;  // what nobody wrote is not read
        x[i] = reinterpret_cast<const float4*>(args.o_parts + part(cta) * kDim)[lane];
        if (w[i] == 0) x[i] = {};
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        weight += w[i];
        o.x += w[i] * x[i].x, o.y += w[i] * x[i].y, o.z += w[i] * x[i].z, o.w += w[i] * x[i].w;
      }
    }
  }
  const float inverse = weight == 0 ? 0 : 1 / weight;
  o.x *= inverse, o.y *= inverse, o.z *= inverse, o.w *= inverse;
  if (args.o.data != nullptr)
    store_columns(o, args.o.at(t, head) + 4 * lane);
  else
    store_columns(o, args.o_wide.at(t, head) + 4 * lane);
  if (lane == 0 && args.lse.data != nullptr)
    *args.lse.at(t, head) = weight == 0 ? -INFINITY : lse_of(max, weight, args.scale);
}

}  // namespace msa::cuda::sm90::dense
