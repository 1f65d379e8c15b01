// A stream of CUDA by name, for headers that do without CUDA's own.
#pragma once

struct CUstream_st;

namespace msa::cuda {

using Stream = CUstream_st*;  ///< cudaStream_t

}  // namespace msa::cuda
