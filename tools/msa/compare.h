// How results are judged against the reference: positions of NaN and infinities first, then error
// norms; block lists by the scores of what they name.
#pragma once

#include <span>
#include <string>

#include "msa/msa.h"

namespace msa::cli {

/// What a comparison found.
struct Verdict {
  double max_error = 0;  ///< largest |actual - expected| / (1 + |expected|)
  std::string failure;   ///< empty = ok; else the first thing that is wrong
  bool ok() const { return failure.empty(); }
  void merge(const Verdict& other);
};

/// Values of equal shape, any strides; integers must be equal. `inputs` is the dtype of the
/// operator's inputs: what it was computed from bounds what can be asked of the result.
void compare(const TensorView& actual, const TensorView& expected, DType inputs, Verdict* verdict);

/// Every byte of two contiguous tensors.
void compare_bytes(const TensorView& actual, const TensorView& expected, Verdict* verdict);

/// One list of block ids against the reference's scores of the visible blocks: min(K, visible)
/// ascending ids, forced blocks among them, -1 in the tail, and no block left out whose score is
/// clearly above that of a block taken. max_error becomes that gap of scores.
void compare_list(std::span<const int32_t> ids, std::span<const float> scores,
                  const Problem& problem, Verdict* verdict);

}  // namespace msa::cli
