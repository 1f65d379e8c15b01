#include "cpu/linear.h"

#include "core/half.h"

namespace msa::cpu {

LinearWeight::LinearWeight(const void* w, DType dtype, int64_t n, int64_t k) : n_(n), k_(k) {
  panels_.resize(static_cast<size_t>(n * k));
  for (int64_t i = 0; i < n * k; ++i) panels_[static_cast<size_t>(i)] = load_f32(w, dtype, i);
}

void LinearWeight::multiply(const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy,
                            Threads& threads) const {
  threads.parallel_for(m, [&](int64_t row, int) {
    for (int64_t j = 0; j < n_; ++j) {
      float sum = 0;
      for (int64_t i = 0; i < k_; ++i)
        sum += x[row * ldx + i] * panels_[static_cast<size_t>(j * k_ + i)];
      y[row * ldy + j] = sum;
    }
  });
}

}  // namespace msa::cpu
