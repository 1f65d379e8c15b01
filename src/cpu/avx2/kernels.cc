#include "cpu/generic/kernels.h"

#include "cpu/avx2/isa.h"
#include "cpu/generic/linear.h"

namespace msa::cpu {

const Kernels kAvx2 = kernels_of<Avx2>();
const LinearKernel kAvx2Linear{Avx2::kCols, linear<Avx2>};

}  // namespace msa::cpu
