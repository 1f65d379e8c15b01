// Views of any operator's arguments, element by element.
#pragma once

#include <cstddef>
#include <variant>
#include <vector>

#include "msa/msa.h"

namespace msa::conformance {

template <class... P>
std::variant<P...> one_of(ParamsList<P...>);
using Params = decltype(one_of(AllParams{}));

ParamsRef params_ref(const Params& params);
/// The struct of arguments, for the tables of core/op_table.h.
void* data_of(Params& params);

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
