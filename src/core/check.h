// The border: every argument is checked here once, by name and shape, before a backend sees it.
#pragma once

#include "core/op_table.h"
#include "msa/backend.h"

namespace msa {

/// Ok, or kInvalidArgument with "<argument>: got <given>, expected <legal>". One pass over the
/// metadata, no allocation on success.
Status check(const Plan& plan, const ParamsRef& params);

// What operators ask beyond the table of op_table.h.
Status check_select_blocks(const Border& border, const ParamsRef& params);
Status check_parts(const Border& border, const ParamsRef& params);
Status check_append_paged(const Border& border, const ParamsRef& params);
/// row_ptr and entries, when given, are what block_lists makes of the ids.
Status check_inverse_lists(const Border& border, const ParamsRef& params);

}  // namespace msa
