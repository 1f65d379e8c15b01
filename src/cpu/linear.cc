#include "cpu/linear.h"

#include "core/half.h"
#include "core/registry.h"
#include "cpu/kernels.h"

namespace msa::cpu {
namespace {

/// For machines without vector kernels: eight columns at a time, which compilers turn into what
/// there is.
void multiply_portable(const float* x, int64_t ldx, int64_t m, const float* panels, int64_t n,
                       int64_t k, float* y, int64_t ldy, Threads& threads) {
  constexpr int64_t kColumns = 8;
  threads.parallel_for(m, [&](int64_t row, int) {
    for (int64_t col = 0; col < n; col += kColumns) {
      float sum[kColumns]{};
      const float* panel = panels + col * k;
      for (int64_t d = 0; d < k; ++d) {
        for (int64_t c = 0; c < kColumns; ++c) sum[c] += x[row * ldx + d] * panel[d * kColumns + c];
      }
      for (int64_t c = 0; c < kColumns && col + c < n; ++c) y[row * ldy + col + c] = sum[c];
    }
  });
}

constexpr LinearKernel kPortable{8, multiply_portable};

const LinearKernel& kernel() {
#if MSA_WITH_X86
  static const LinearKernel& best = avx512_backend()->usable() ? kAvx512Linear
                                    : avx2_backend()->usable() ? kAvx2Linear
                                                               : kPortable;
  return best;
#else
  return kPortable;
#endif
}

}  // namespace

LinearWeight::LinearWeight(const void* w, DType dtype, int64_t n, int64_t k) : n_(n), k_(k) {
  const int64_t columns = kernel().columns;
  panels_.resize(static_cast<size_t>((n + columns - 1) / columns * columns * k));
  for (int64_t row = 0; row < n; ++row) {
    float* panel = panels_.data() + row / columns * columns * k + row % columns;
    for (int64_t d = 0; d < k; ++d) panel[d * columns] = load_f32(w, dtype, row * k + d);
  }
}

void LinearWeight::multiply(const float* x, int64_t ldx, int64_t m, float* y, int64_t ldy,
                            Threads& threads) const {
  kernel().multiply(x, ldx, m, panels_.data(), n_, k_, y, ldy, threads);
}

}  // namespace msa::cpu
