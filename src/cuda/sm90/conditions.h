// What the tuned families ask of problems and calls in common. No CUDA here nor in any family.cc,
// so that it is tested on any machine.
#pragma once

#include <initializer_list>
#include <utility>

#include "msa/backend.h"

namespace msa::cuda {

/// Whether address and strides are multiples of 16 bytes, as tensor maps and 16-byte accesses need.
bool aligned(const TensorView& view);

namespace sm90 {

/// bf16 rows of 128 columns: D if `head`, Di if `index`.
Refusal rows_fit(const Problem& problem, bool head, bool index);
/// Groups of 8 or 16 query heads.
Refusal group_fits(const Problem& problem);
/// Plans of decoding steps.
Refusal step_fits(const Limits& limits);
/// What the decode family leaves: packed keys, or more tokens than a decoding step has.
Refusal prefill_fits(const Problem& problem, const Limits& limits);
Refusal scale_fits(float softmax_scale);
Refusal all_aligned(std::initializer_list<std::pair<const char*, const TensorView*>> views);

}  // namespace sm90
}  // namespace msa::cuda
