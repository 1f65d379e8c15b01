// One operator call from Python, the same path for every operator.
#pragma once

#include <nanobind/nanobind.h>

#include "core/op_table.h"

namespace msa::python {

namespace nb = nanobind;

/// Reads the arrays, fills the Problem from their shapes and the Limits from the metadata, takes
/// the cached plan, makes the outputs that were not given, and runs without the GIL.
///   tensors    an array or None for each argument of the table; True: an output to be made
///   batch      cu_seqlens_q, cu_seqlens_k, seq_lens, page_table, q_offset, block_offset,
///              page_rows, likewise; None for operators without
///   options    causal, block_size, max_seqlen_q, max_seqlen_k, softmax_scale, topk, init_blocks,
///              local_blocks, num_blocks: None, or none behind the last, where an operator has no
///              such option
///   plan       a Plan, or None: the cached one for `backend`, a name
///   workspace  an array, or None for memory of ours
/// Returns the outputs in the order of the table, None for those not asked for.
nb::tuple call(const OpInfo& info, const nb::tuple& tensors, nb::handle batch,
               const nb::tuple& options, nb::handle plan, nb::object workspace, nb::handle backend);

/// Where an operator has one output, that is `out` in Python.
const char* name_in_python(const OpInfo& info, const Argument& argument);

}  // namespace msa::python
