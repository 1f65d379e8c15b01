// One operator call from Python: a table of arguments per operator, and one path for all of them.
//
// A call reads its arrays, fills the Problem from their shapes and the Limits from the metadata,
// takes the cached plan, makes the outputs that were not given, and runs without the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <span>

#include "msa/backend.h"
#include "tensors.h"

namespace msa::python {

enum class Role {
  kInput,
  kOptional,  ///< an input that may be missing
  kOutput,    ///< None: made by the call
  kExtra,     ///< an output only on request; True: made by the call
  kUpdated,   ///< memory of the caller that is written in part; may be missing
};

/// One array argument. Shapes are letters of problem.h; `paged` replaces `packed` for paged keys.
template <class Params>
struct Slot {
  const char* name;  ///< in Python
  const char* core;  ///< in messages of the library
  Role role;
  Content content;
  const char* packed;
  const char* paged;
  TensorView Params::* view;
};

/// The arguments of an operator, in the order that Python passes them.
template <class Params>
std::span<const Slot<Params>> slots();

/// `tensors`: the arrays of slots<Params>(). `batch`: cu_seqlens_q, cu_seqlens_k, seq_lens,
/// page_table, q_offset and block_offset, or None. `options`: causal, block_size, topk,
/// init_blocks, local_blocks, softmax_scale, max_seqlen_q, max_seqlen_k, each None where it has no
/// meaning. `backend` is a name; `plan` (or None) replaces the cached one, `workspace` (or None)
/// our memory. Returns the outputs, None for those not asked for.
template <class Params>
nb::tuple call(Op op, nb::tuple tensors, nb::object batch, nb::tuple options, nb::object plan,
               nb::object workspace, const std::string& backend);

}  // namespace msa::python
