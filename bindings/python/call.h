// One operator call from Python, the same path for every operator.
//
// A call reads its arrays, fills the Problem from their shapes and the Limits from the metadata,
// takes the cached plan, makes the outputs that were not given, and runs without the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include "msa/backend.h"

namespace msa::python {

namespace nb = nanobind;

/// What Python hands over.
struct Request {
  nb::tuple tensors;     ///< the arrays of slots<Params>()
  nb::object batch;      ///< the arrays of kBatch, a tuple; None for operators without a batch
  nb::tuple options;     ///< causal, block_size, topk, init_blocks, local_blocks, softmax_scale,
                         ///< max_seqlen_q, max_seqlen_k, num_blocks; None where not meant
  nb::object plan;       ///< a Plan, or None: the cached one
  nb::object workspace;  ///< an array, or None: memory of ours
  nb::object backend;    ///< a name
};

/// Returns the outputs in the order of the slots, None for those not asked for.
template <class Params>
nb::tuple call(Op op, const Request& request);

}  // namespace msa::python
