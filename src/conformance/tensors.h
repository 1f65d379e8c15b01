// Views of any operator's arguments, element by element.
#pragma once

#include <cstddef>
#include <variant>
#include <vector>

#include "msa/msa.h"

namespace msa::conformance {

using Params = std::variant<IndexScoresParams, SelectBlocksParams, IndexSelectParams,
                            SparseAttentionParams, DenseAttentionParams, MergeParams,
                            BlockListsParams, AppendPagedParams, BlockMassParams, LayerDecodeParams,
                            AttentionBackwardParams, IndexLseParams, KlParams>;

struct Output {
  const char* name;
  TensorView* view;
};
/// The outputs that were given.
std::vector<Output> outputs(Params& params);

/// Every argument, given or not, the batch's included.
std::vector<TensorView*> arguments(Params& params);

/// Offset of element `linear`, counted in row-major order of the shape.
int64_t element_offset(const TensorView& view, int64_t linear);

/// The elements of a view in row-major order, without gaps.
std::vector<std::byte> gather(const TensorView& view);
/// The inverse.
void scatter(const std::vector<std::byte>& elements, const TensorView& view);

}  // namespace msa::conformance
