#include "msa/problem.h"
#include "msa/tensor.h"

namespace msa {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBF16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kI32:
      return "i32";
    case DType::kE4M3:
      return "e4m3";
    case DType::kI8:
      return "i8";
    case DType::kE2M1:
      return "e2m1";
  }
  return "unknown";
}

const char* name_of(Op op) {
  switch (op) {
    case Op::kIndexScores:
      return "index_scores";
    case Op::kSelectBlocks:
      return "select_blocks";
    case Op::kIndexSelect:
      return "index_select";
    case Op::kSparseAttention:
      return "sparse_attention";
    case Op::kSparseDecode:
      return "sparse_decode";
    case Op::kDenseAttention:
      return "dense_attention";
    case Op::kMerge:
      return "merge";
    case Op::kBlockLists:
      return "block_lists";
    case Op::kAppendPaged:
      return "append_paged";
    case Op::kBlockMass:
      return "block_mass";
  }
  return "unknown";
}

}  // namespace msa
