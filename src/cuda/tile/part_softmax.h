// What a partial result must carry beside its values to be combined with others; plain data.
#pragma once

namespace msa::cuda {

/// The softmax over some of a row's keys.
struct PartSoftmax {
  float max;  ///< exponent of the largest score, as OnlineSoftmax has it; -inf: no key is seen
  float sum;  ///< of exp2(exponent - max)
};

}  // namespace msa::cuda
