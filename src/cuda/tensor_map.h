// Tensor maps: how TMA sees a caller's tensor. They go to kernels by value, as
// `const __grid_constant__ CUtensorMap`. Pure host arithmetic; the driver's encoder is found
// through the runtime, so that nothing links against libcuda.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "msa/problem.h"
#include "msa/status.h"
#include "msa/tensor.h"

namespace msa::cuda {

/// Keys or values, or index keys with one head, as (column, token, head, page):
///   [S,Hkv,D] or [S,Di]            packed: pages 1, token = row of the tensor
///   [P,Hkv,Bk,D] or [P,Bk,Di]      paged:  token = row in the page
/// A box is [rows tokens, 64 columns], swizzled for SharedTile. Errors: kInvalidArgument when the
/// address or a stride is not a multiple of 16 bytes.
Status map_keys(const char* name, const TensorView& keys, KvLayout layout, uint32_t rows,
                CUtensorMap* out);

/// Queries or outputs [T,H,D] as (column, head, token, 0): a box is `heads` heads of `tokens`
/// tokens, 64 columns.
Status map_queries(const char* name, const TensorView& queries, uint32_t heads, uint32_t tokens,
                   CUtensorMap* out);

}  // namespace msa::cuda
