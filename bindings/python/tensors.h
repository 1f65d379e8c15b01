// Python arrays as TensorViews: torch tensors, NumPy arrays, and whatever else speaks DLPack.
// Nothing is copied; a view is valid while its Python object lives.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <string>
#include <vector>

#include "core/op_table.h"
#include "msa/backend.h"
#include "msa/tensor.h"

namespace msa::python {

namespace nb = nanobind;

/// Keeps what a generic DLPack exporter lent, until the call ends.
using Leases = std::vector<nb::ndarray<nb::ro>>;

/// The view of `array`. Errors name the argument: TypeError for what is no array or of a wrong
/// dtype, NotImplementedError for rows of 8 bits, ValueError for a wrong device or rank, for
/// foreign byte order, and, if `written`, read-only memory.
TensorView view_of(nb::handle array, const char* name, Content content, bool written,
                   Leases* leases);

/// The memory of a contiguous vector of any dtype. Errors: as above.
Workspace workspace_of(nb::handle array, Leases* leases);

/// The current stream on a CUDA device of the framework that `array` belongs to.
void* current_stream(nb::handle array, Device device);

}  // namespace msa::python
