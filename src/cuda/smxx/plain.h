// Every operator for any legal shape, on any GPU from sm_80 on: readable first. The tuned families
// (sm90/) are compared with these, and fall back to them.
#pragma once

#include <span>

#include "cuda/stream.h"
#include "msa/backend.h"

namespace msa::cuda::plain {

/// A launch of each operator: specialised for every struct of arguments, next to its kernel.
template <class Params>
Status run(const Plan&, const Params&, Workspace, Stream stream);

/// Every operator; refuses what does not fit into a grid or into the device's shared memory.
std::span<const Kernel> kernels();

// Parts of the above.
int64_t index_select_bytes(const Problem& problem, const Limits& limits);
int64_t block_lists_bytes(const Problem& problem, const Limits& limits);
int64_t attention_backward_bytes(const Problem& problem, const Limits& limits);
int64_t kl_bytes(const Problem& problem, const Limits& limits);
// Shared memory of one CTA. No forward operator takes more than sparse and dense attention.
uint32_t attention_shared_bytes(const Problem& problem);
uint32_t attention_backward_shared_bytes(const Problem& problem);
uint32_t index_lse_shared_bytes(const Problem& problem);
uint32_t kl_shared_bytes(const Problem& problem);

}  // namespace msa::cuda::plain
