// Exceptions with composed messages: raise(PyExc_ValueError, "topk: got ", k, ", expected >= 1").
#pragma once

#include <nanobind/nanobind.h>

#include "core/text.h"

namespace msa::python {

template <class... Parts>
[[noreturn]] void raise(PyObject* type, const Parts&... parts) {
  PyErr_SetString(type, text(parts...).c_str());
  throw nanobind::python_error();
}

/// kInvalidArgument is a ValueError; what no backend can do, or none that is here, a
/// NotImplementedError; the rest a RuntimeError.
inline void raise_unless_ok(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidArgument:
      raise(PyExc_ValueError, status.message());
    case StatusCode::kUnsupported:
    case StatusCode::kUnavailable:
      raise(PyExc_NotImplementedError, status.message());
    default:
      raise(PyExc_RuntimeError, status.message());
  }
}

}  // namespace msa::python
