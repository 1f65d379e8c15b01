// What a partial result must carry beside its values to be combined with others; plain data.
#pragma once

namespace msa::cuda {

/// The softmax over some of a row's keys.
struct PartSoftmax {
  float max;  ///< of the raw scores; -inf: none of the keys is seen
  float sum;  ///< of exp2((score - max) * scale)
};

}  // namespace msa::cuda
