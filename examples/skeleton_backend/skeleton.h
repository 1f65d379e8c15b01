// A whole backend in one page, to copy from: docs/adding-a-kernel.md walks through it.
#pragma once

#include "msa/backend.h"

namespace msa {

const Backend* skeleton_backend();

}  // namespace msa
