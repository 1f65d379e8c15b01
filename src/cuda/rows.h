// Rows of a caller's tensor as a kernel sees them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "msa/tensor.h"

namespace msa::cuda {

/// Of a tensor [T,H,...] or [H,T,...], strides in elements. T may be void: then at<U>().
template <class T>
struct Rows {
  T* data = nullptr;  ///< null: not given
  int64_t token = 0, head = 0;

  template <class U = T>
  __device__ U* at(int64_t t, int64_t h) const {
    return static_cast<U*>(data) + t * token + h * head;
  }
  __device__ int64_t offset(int64_t t, int64_t h) const { return t * token + h * head; }
};

/// Those of `view`, whose tokens are its axis 0 or 1, or nothing where it is not given.
template <class T>
Rows<T> rows(const TensorView& view, size_t token_axis = 0) {
  if (!view.given()) return {};
  return {static_cast<T*>(view.data), view.stride[token_axis], view.stride[1 - token_axis]};
}

}  // namespace msa::cuda
