#include "cpu/generic/kernels.h"

#include "cpu/avx512/isa.h"
#include "cpu/generic/linear.h"

namespace msa::cpu {

const Kernels kAvx512 = kernels_of<Avx512>();
const LinearKernel kAvx512Linear{Avx512::kCols, linear<Avx512>};

}  // namespace msa::cpu
