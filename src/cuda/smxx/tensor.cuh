// Tensors and queries as the plain kernels see them: any dtype, any strides, nothing aligned.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/batch.cuh"
#include "msa/backend.h"

namespace msa::cuda::plain {

/// Element (i, j, ...) is data[i*stride[0] + j*stride[1] + ...]; null data = not given.
struct Tensor {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int64_t stride[kMaxRank] = {};

  template <class... Index>
  __device__ int64_t offset(Index... index) const {
    int64_t sum = 0;
    int axis = 0;
    ((sum += static_cast<int64_t>(index) * stride[axis++]), ...);
    return sum;
  }
  template <class T, class... Index>
  __device__ T& at(Index... index) const {
    return static_cast<T*>(data)[offset(index...)];
  }
};

inline Tensor tensor(const TensorView& view) {
  Tensor t{.data = view.given() ? view.data : nullptr, .dtype = view.dtype};
  for (size_t i = 0; i < static_cast<size_t>(view.rank); ++i) t.stride[i] = view.stride[i];
  return t;
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }

/// visit(pointer to the elements in their own type)
template <class Visit>
__device__ void with_elements(const void* data, DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::kBF16:
      return visit(static_cast<const __nv_bfloat16*>(data));
    case DType::kF16:
      return visit(static_cast<const __half*>(data));
    default:
      return visit(static_cast<const float*>(data));
  }
}

__device__ inline void store(const Tensor& to, int64_t offset, float value) {
  switch (to.dtype) {
    case DType::kBF16:
      static_cast<__nv_bfloat16*>(to.data)[offset] = __float2bfloat16_rn(value);
      break;
    case DType::kF16:
      static_cast<__half*>(to.data)[offset] = __float2half_rn(value);
      break;
    default:
      static_cast<float*>(to.data)[offset] = value;
  }
}

/// Keys, values or index keys, packed or paged: the row of head h is
/// data + place.row*row_stride + h*head_stride + place.slot*slot_stride.
struct KeyTensor {
  const void* data;
  DType dtype;
  int64_t row_stride;   ///< of a token (packed) or a page
  int64_t head_stride;  ///< 0 for index keys: one head for all
  int64_t slot_stride;  ///< of a token in its page; 0 when packed
};

inline KeyTensor key_tensor(const TensorView& keys, KvLayout layout) {
  const bool paged = layout == KvLayout::kPaged;
  const bool has_heads = keys.rank == (paged ? 4 : 3);
  return {.data = keys.data,
          .dtype = keys.dtype,
          .row_stride = keys.stride[0],
          .head_stride = has_heads ? keys.stride[1] : 0,
          .slot_stride = paged ? keys.stride[has_heads ? 2 : 1] : 0};
}

/// Where a token's rows lie; row < 0: nowhere.
struct Place {
  int32_t row = -1;
  int32_t slot = 0;
};

/// `token` is one of s's given keys.
__device__ inline Place place_of(const DeviceBatch& batch, const DeviceSequence& s, int token) {
  if (s.pages == nullptr) return {s.k_begin + token, 0};
  return {batch.page(s, token / batch.block_size), token % batch.block_size};
}

/// Query row t: its sequence, and which of its keys it sees: 0 .. visible-1.
struct Query {
  DeviceSequence s{};
  int i = 0;  ///< index in the sequence
  int visible = 0;

  __device__ int64_t position() const { return int64_t{s.pos0} + i; }
};

/// A row that belongs to no sequence sees nothing.
__device__ inline Query query_at(const DeviceBatch& batch, int t) {
  const int b = batch.sequence_of(t);
  if (b < 0) return {};
  const DeviceSequence s = batch.sequence(b);
  const int i = t - s.q_begin;
  if (i < 0 || i >= s.q_len) return {};
  return {s, i, s.visible(i, batch.block_size, batch.causal)};
}

/// Most blocks a sequence can have, by the plan and by the tensors that hold keys and pages.
inline int64_t most_blocks(const Plan& plan, const Batch& batch, const TensorView& keys) {
  const int64_t block = plan.problem.block_size;
  const int64_t planned = (plan.limits.max_seqlen_k + block - 1) / block;
  const int64_t given = batch.page_table.given()
                            ? batch.page_table.shape[static_cast<size_t>(batch.page_table.rank - 1)]
                            : (keys.shape[0] + block - 1) / block;
  return planned < given ? planned : given;
}

}  // namespace msa::cuda::plain
