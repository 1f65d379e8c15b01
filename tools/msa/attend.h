// Operators on the tensors of one safetensors file.
//
// Tensors carry the argument names of the operators: q, k, v, q_idx, k_idx, ids, cu_seqlens_q,
// cu_seqlens_k, page_table, seq_lens. With page_table the keys are pages; without cu_seqlens all
// rows are one sequence.
#pragma once

#include <cstddef>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "msa/arrays.h"
#include "msa/verdict.h"

namespace msa::cli {

struct AttendOptions {
  std::string op;  ///< "" = what the tensors allow: msa, sparse, dense or index_select
  std::string backend = "auto";
  int32_t block = 0;  ///< Bk; 0 = the page size, or 128
  int32_t topk = 0;   ///< K; 0 = the width of ids, or 16
  int32_t init_blocks = 0;
  int32_t local_blocks = 1;
  std::optional<float> scale = std::nullopt;  ///< default 1/sqrt(D); not 0
  bool causal = true;
  bool check = false;  ///< also compute with the reference and compare
};

struct AttendResult {
  std::string op;
  const Backend* backend = nullptr;
  double seconds = 0;                                  ///< of the operators alone
  std::vector<std::pair<std::string, Array>> outputs;  ///< ids, o, lse
  std::optional<Verdict> verdict;                      ///< when asked for
};

/// Computes on a whole file in memory. Any bytes are safe; errors name tensor, given and expected.
Status attend(std::span<const std::byte> file, const AttendOptions& options, Threads& threads,
              AttendResult* out);

}  // namespace msa::cli
