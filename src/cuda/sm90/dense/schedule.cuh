// Who computes what. The work of a call is a line of steps: sequence after sequence, and in a
// sequence unit after unit, a unit being one KV head with one tile of queries, the latest tile
// first (under a causal mask the longest one).
//
//   whole tiles   a unit is one step; CTAs take the next one when they are free.
//   split         a unit is as many steps as its sequence has blocks; CTA i of n takes the steps
//                 total*i/n .. total*(i+1)/n - 1, whatever the lengths are. A unit that lies in
//                 several CTAs leaves partial results, and `merge` combines them in order.
//
// Lengths are read on the device. Functions here are for whole warps.
#pragma once

#include <cstdint>

#include "cuda/sm90/dense/config.h"

namespace msa::cuda::sm90::dense {

/// Steps of one sequence.
struct Cut {
  int tiles;      ///< of query tokens
  int unit;       ///< steps of one unit
  int64_t steps;  ///< of all: Hkv * tiles * unit
};

__device__ inline int blocks_of(int keys) { return (keys + kBlock - 1) / kBlock; }

__device__ inline Cut cut(const Args& args, int b) {
  const DeviceSequence s = args.batch.sequence(b);
  Cut c;
  c.tiles = (s.q_len + args.tile_tokens - 1) / args.tile_tokens;
  c.unit = 1;  // a unit without keys still has to write its zeros
  if (args.split) c.unit = max(1, blocks_of(s.visible(s.q_len - 1, kBlock, args.batch.causal)));
  c.steps = int64_t{args.heads_kv} * c.tiles * c.unit;
  return c;
}

__device__ inline int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value += __shfl_xor_sync(0xffffffff, value, lanes);
  return value;
}

/// Steps of the sequences before `b`.
__device__ inline int64_t steps_before(const Args& args, int b) {
  int64_t sum = 0;
  for (int i = static_cast<int>(threadIdx.x % 32); i < b; i += 32) sum += cut(args, i).steps;
  return warp_sum(sum);
}

/// CTA i of n takes steps share_begin(i) .. share_begin(i+1)-1 of `total`.
__device__ inline int64_t share_begin(int64_t total, int i, int n) { return total * i / n; }
/// Which CTA takes a step.
__device__ inline int share_owner(int64_t total, int64_t step, int n) {
  return static_cast<int>(((step + 1) * n - 1) / total);
}
/// Where a CTA leaves its part of a unit: it has at most one unit that began before its share and
/// one that goes on behind it.
__device__ inline int part_slot(int cta, bool begins_unit) { return 2 * cta + begins_unit; }

/// Finds sequences by step, going forward: 32 at a time, one per lane.
class Walk {
 public:
  /// The sequence that holds `step`, and its first step; steps never descend. False behind the
  /// last.
  __device__ bool seek(const Args& args, int64_t step, int* b, int64_t* begin) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    while (step >= __shfl_sync(0xffffffff, end_, 31)) {
      const int64_t before = __shfl_sync(0xffffffff, end_, 31);
      first_ += 32;
      if (first_ >= args.batch.sequences) return false;
      end_ = first_ + lane < args.batch.sequences ? cut(args, first_ + lane).steps : 0;
#pragma unroll
      for (int lanes = 1; lanes < 32; lanes *= 2) {
        const int64_t lower = __shfl_up_sync(0xffffffff, end_, lanes);
        if (lane >= lanes) end_ += lower;
      }
      begin_ = before;
      end_ += before;
    }
    const int found = __ffs(static_cast<int>(__ballot_sync(0xffffffff, step < end_))) - 1;
    const int64_t last_end = __shfl_sync(0xffffffff, end_, found > 0 ? found - 1 : 0);
    *b = first_ + found;
    *begin = found > 0 ? last_end : begin_;
    return true;
  }

 private:
  int first_ = -32;    // sequence of lane 0
  int64_t begin_ = 0;  // steps before it
  int64_t end_ = 0;    // steps up to and with this lane's sequence
};

/// What the consumers compute next.
struct Segment {
  int tokens = 0;  ///< query tokens of the tile; 0: the work is done
  int row = 0;     ///< row of the first one in q
  int kv_head = 0;
  int visible =
      0;  ///< keys that the first token sees, before the cut at kv_len; one more per token
  int kv_len = 0;
  int first = 0;  ///< blocks first .. last-1
  int last = 0;
  int slot = -1;    ///< of the partial result, or -1: the result is whole
  bool top = true;  ///< no part of the unit has later blocks

  /// Keys visible to the tile's token i.
  __device__ int limit(int i) const { return min(max(visible + i, 0), kv_len); }
};

/// One CTA's segments, in order.
class Schedule {
 public:
  __device__ explicit Schedule(const Args& args) {
    if (!args.split) return;
    const int64_t total = steps_before(args, args.batch.sequences);
    const int cta = static_cast<int>(blockIdx.x), ctas = static_cast<int>(gridDim.x);
    step_ = share_begin(total, cta, ctas);
    end_ = share_begin(total, cta + 1, ctas);
  }

  /// `sequence` is the segment's, for the producer.
  __device__ Segment next(const Args& args, DeviceSequence* sequence) {
    if (!args.split) {
      if (threadIdx.x % 32 == 0) step_ = atomicAdd(args.next_tile, 1);
      step_ = __shfl_sync(0xffffffff, step_, 0);
      end_ = step_ + 1;
    }
    int b;
    int64_t begin;
    if (step_ >= end_ || !walk_.seek(args, step_, &b, &begin)) return {};
    const DeviceSequence& s = *sequence = args.batch.sequence(b);
    const Cut c = cut(args, b);
    const int64_t unit = (step_ - begin) / c.unit;
    const int offset = static_cast<int>((step_ - begin) % c.unit);
    const int steps = static_cast<int>(min(int64_t{c.unit - offset}, end_ - step_));
    step_ += steps;

    Segment segment;
    const int first_token = (c.tiles - 1 - static_cast<int>(unit % c.tiles)) * args.tile_tokens;
    segment.tokens = min(args.tile_tokens, s.q_len - first_token);
    segment.row = s.q_begin + first_token;
    segment.kv_head = static_cast<int>(unit / c.tiles);
    segment.kv_len = s.kv_len;
    segment.visible = args.batch.causal ? s.pos0 - s.block0 * kBlock + first_token + 1 : s.kv_len;
    const int blocks = blocks_of(segment.limit(segment.tokens - 1));
    segment.first = args.split ? min(offset, blocks) : 0;
    segment.last = args.split ? min(offset + steps, blocks) : blocks;
    segment.top = !args.split || offset + steps == c.unit;
    if (steps < c.unit) segment.slot = part_slot(static_cast<int>(blockIdx.x), offset == 0);
    return segment;
  }

 private:
  int64_t step_ = 0, end_ = 0;
  Walk walk_;
};

}  // namespace msa::cuda::sm90::dense
