// The arithmetic the plain kernels share. A CTA has up to 16 query rows: heads of one token that
// read the same keys. A warp has four of them, its lanes are 32 keys. Rows lie in shared memory as
// fp32, so that dtypes, strides and pages are forgotten where they are staged.
#pragma once

#include "cuda/ptx/shared.cuh"
#include "cuda/smxx/tensor.cuh"

namespace msa::cuda::plain {

inline constexpr int kWarpRows = 4;
inline constexpr int kMostRows = 16;
inline constexpr int kKeys = 32;  // a lane each

/// Rows of a CTA: `group` query heads are cut into chunks of up to 16.
struct RowCut {
  int chunks;
  int warps;

  explicit RowCut(int group)
      : chunks((group + kMostRows - 1) / kMostRows),
        warps(((group < kMostRows ? group : kMostRows) + kWarpRows - 1) / kWarpRows) {}
};

/// The chunk of a CTA; blockIdx.y counts them, KV head after KV head.
struct HeadChunk {
  int kv_head;
  int head;  ///< its first query head
  int rows;
};
__device__ inline HeadChunk head_chunk(int group) {
  const int chunks = (group + kMostRows - 1) / kMostRows;
  const int kv_head = static_cast<int>(blockIdx.y) / chunks;
  const int first = static_cast<int>(blockIdx.y) % chunks * kMostRows;
  return {
      .kv_head = kv_head, .head = kv_head * group + first, .rows = min(group - first, kMostRows)};
}

/// How many CTAs share a walk over `columns` blocks, when `others` CTAs work beside each of them:
/// enough to fill any GPU, at most a grid's z.
inline uint32_t walks(int64_t others, int64_t columns) {
  constexpr int64_t kEnough = 8192, kMostZ = 65535;
  const int64_t most = columns < kMostZ ? columns : kMostZ;
  const int64_t wanted = kEnough / (others > 0 ? others : 1);
  return static_cast<uint32_t>(wanted < 1 || most < 1 ? 1 : wanted < most ? wanted : most);
}

/// Elements from one staged row to the next: whole float4s, and an odd number of them, so that 32
/// lanes read 32 rows without bank conflicts.
__host__ __device__ constexpr int pitch_of(int dim) { return 4 * (((dim + 3) / 4) | 1); }

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int warp() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int warps() { return static_cast<int>(blockDim.x) / 32; }

/// Copies rows 0 .. rows-1 to tile[row][pitch], by all warps of the CTA; offset(row) says where a
/// row of `dim` elements begins, or < 0 for a row of zeros. Eight loads are in flight per lane.
template <class Offset>
__device__ void stage(float* tile, int rows, int dim, const void* data, DType dtype,
                      const Offset& offset) {
  constexpr int kFlight = 8;
  const int pitch = pitch_of(dim), columns = (dim + 3) / 4 * 4;
  with_elements(data, dtype, [&](const auto* elements) {
    for (int first = warp() * kFlight; first < rows; first += warps() * kFlight) {
      int64_t begin[kFlight];
#pragma unroll
      for (int i = 0; i < kFlight; ++i) begin[i] = first + i < rows ? offset(first + i) : -1;
      for (int d = lane(); d < columns; d += 32) {
        float x[kFlight];
#pragma unroll
        for (int i = 0; i < kFlight; ++i)
          x[i] = begin[i] >= 0 && d < dim ? to_float(elements[begin[i] + d]) : 0.0f;
#pragma unroll
        for (int i = 0; i < kFlight; ++i)
          if (first + i < rows) tile[(first + i) * pitch + d] = x[i];
      }
    }
  });
}

/// The same for 32 keys of head `head`; lane l of every warp knows the place of key l.
__device__ inline void stage_keys(float* tile, int dim, const KeyTensor& keys, int head,
                                  Place place) {
  stage(tile, kKeys, dim, keys.data, keys.dtype, [&](int key) {
    const int row = __shfl_sync(0xffffffff, place.row, key);
    const int slot = __shfl_sync(0xffffffff, place.slot, key);
    return row < 0 ? -1 : row * keys.row_stride + head * keys.head_stride + slot * keys.slot_stride;
  });
}

/// scores[i] = row i of this warp . key of this lane, both staged. Sums in ascending order.
template <int kRows>
__device__ void products(const float* rows, const float* keys, int dim, float (&scores)[kRows]) {
  const int pitch = pitch_of(dim) / 4;
  const float4* key = reinterpret_cast<const float4*>(keys) + lane() * pitch;
  const float4* row = reinterpret_cast<const float4*>(rows);
  for (float& score : scores) score = 0;
  for (int c = 0; c < (dim + 3) / 4; ++c) {
    const float4 k = key[c];
    for (int i = 0; i < kRows; ++i) {
      const float4 q = row[i * pitch + c];
      scores[i] = fmaf(q.x, k.x, scores[i]);
      scores[i] = fmaf(q.y, k.y, scores[i]);
      scores[i] = fmaf(q.z, k.z, scores[i]);
      scores[i] = fmaf(q.w, k.w, scores[i]);
    }
  }
}

/// o[i][d] = o[i][d]*decay[i] + sum over 32 keys of weights[i][key] values[key][d], by one warp.
__device__ inline void add_values(float* o, const float* weights, const float* values, int dim,
                                  const float (&decay)[kWarpRows]) {
  const int pitch = pitch_of(dim);
  for (int d = lane(); d < dim; d += 32) {
    float sum[kWarpRows];
    for (int i = 0; i < kWarpRows; ++i) sum[i] = o[i * pitch + d] * decay[i];
#pragma unroll
    for (int key = 0; key < kKeys; key += 4) {
      for (int i = 0; i < kWarpRows; ++i) {
        const float4 w = *reinterpret_cast<const float4*>(&weights[i * kKeys + key]);
        sum[i] = fmaf(w.x, values[(key + 0) * pitch + d], sum[i]);
        sum[i] = fmaf(w.y, values[(key + 1) * pitch + d], sum[i]);
        sum[i] = fmaf(w.z, values[(key + 2) * pitch + d], sum[i]);
        sum[i] = fmaf(w.w, values[(key + 3) * pitch + d], sum[i]);
      }
    }
    for (int i = 0; i < kWarpRows; ++i) o[i * pitch + d] = sum[i];
  }
}

/// The same with nothing to decay.
__device__ inline void add_values(float* o, const float* weights, const float* values, int dim) {
  const float decay[kWarpRows] = {1, 1, 1, 1};
  add_values(o, weights, values, dim, decay);
}

__device__ inline float warp_max(float x) {
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffff, x, step));
  return x;
}
__device__ inline float warp_sum(float x) {
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  return x;
}

inline __device__ float infinity() { return __int_as_float(0x7f800000); }

}  // namespace msa::cuda::plain
