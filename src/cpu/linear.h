// Matrix products of the model runner: y = x w^T with w packed once for the widest usable vector
// unit.
#pragma once

#include <cstdint>
#include <vector>

#include "msa/backend.h"

namespace msa::cpu {

/// A weight matrix [n,k] (as nn.Linear stores it), held in f32 panels.
class LinearWeight {
 public:
  LinearWeight() = default;
  /// w: [n,k] row-major f32, bf16 or f16.
  LinearWeight(const void* w, DType dtype, int64_t n, int64_t k);

  int64_t rows() const { return n_; }     ///< outputs
  int64_t columns() const { return k_; }  ///< inputs

  /// y [m,n] = x [m,k] w^T; leading dimensions in elements. Results do not depend on the threads.
  void multiply(const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy,
                Threads& threads) const;

 private:
  int64_t n_ = 0, k_ = 0;
  std::vector<float> panels_;
};

}  // namespace msa::cpu
