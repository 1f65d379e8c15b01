#include "cpu/avx2/isa.h"

#include "cpu/generic/kernels.h"

namespace msa::cpu {

const Kernels kAvx2 = kernels_of<Avx2>();

}  // namespace msa::cpu
