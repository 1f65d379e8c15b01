#include "cpu/avx512/isa.h"

#include "cpu/generic/kernels.h"

namespace msa::cpu {

const Kernels kAvx512 = kernels_of<Avx512>();

}  // namespace msa::cpu
