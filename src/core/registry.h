// The backends of this build. A new backend adds its accessor here and its line in registry.cc.
#pragma once

#include "msa/backend.h"

namespace msa {

const Backend* reference_backend();      ///< fp32
const Backend* reference_f64_backend();  ///< the same text in fp64
const Backend* avx2_backend();
const Backend* avx512_backend();
const Backend* amx_backend();
const Backend* cuda_backend();        ///< with the tuned kernels
const Backend* cuda_plain_backend();  ///< any GPU
const Backend* cuda_union_backend();  ///< cuda with sparse prefill in one order
const Backend* cuda_kv_outer_backend();

}  // namespace msa
