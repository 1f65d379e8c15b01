#include "cpu/amx/isa.h"

#include "cpu/generic/kernels.h"

namespace msa::cpu {

const Kernels kAmx = kernels_of<Amx>();

}  // namespace msa::cpu
