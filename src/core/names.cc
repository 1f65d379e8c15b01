#include <array>

#include "msa/problem.h"
#include "msa/tensor.h"

namespace msa {
namespace {

template <size_t N, class Code>
const char* name_at(const std::array<const char*, N>& names, Code code) {
  const auto i = static_cast<size_t>(code);
  return i < N ? names[i] : "unknown";
}

}  // namespace

const char* name_of(DType dtype) {
  static constexpr std::array names = {"f32", "bf16", "f16", "i32", "e4m3", "i8", "e2m1"};
  return name_at(names, dtype);
}

const char* name_of(Op op) {
  static constexpr std::array names = {"index_scores",
                                       "select_blocks",
                                       "index_select",
                                       "sparse_attention",
                                       "sparse_decode",
                                       "dense_attention",
                                       "merge",
                                       "block_lists",
                                       "append_paged",
                                       "block_mass",
                                       "msa_layer_decode",
                                       "sparse_attention_backward",
                                       "dense_attention_backward",
                                       "index_lse",
                                       "kl_backward",
                                       "kl_loss"};
  static_assert(names.size() == kOpCount);
  return name_at(names, op);
}

}  // namespace msa
