// The tensors of a case. Whatever an operator may not read holds NaN, infinities or absurd ids:
// gaps between rows, pages in no table, tokens past kv_len, rows of padding, ids behind a -1.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <vector>

#include "conformance/cases.h"
#include "conformance/device.h"
#include "conformance/random.h"
#include "conformance/tensors.h"
#include "msa/msa.h"

namespace msa::conformance {

/// An allocation of exactly `size` bytes, so that address sanitizers see its ends.
struct Buffer {
  std::unique_ptr<std::byte[]> data;
  size_t size = 0;
};

class Instance {
 public:
  /// Addresses and strides of 16-bit tensors are multiples of `alignment` bytes; contents do not
  /// depend on it.
  /// Without `results`, inputs that another operator computes hold what may not be read: enough to
  /// ask which kernel takes the call.
  explicit Instance(const Case& c, int64_t alignment = 1, bool results = true);

  const Case& test_case() const { return case_; }
  const Problem& problem() const { return case_.problem; }
  const Limits& limits() const { return limits_; }
  Params& params() { return params_; }
  const Params& params() const { return params_; }

  /// Fills the memory of every output with `pattern`, the zones around it included. append_paged
  /// keeps one pattern: what it does not write is part of its result.
  void poison_outputs(std::byte pattern);
  /// The elements of each output; then the outputs' own elements are poisoned again, and
  /// `untouched` tells whether all of the outputs' memory is as poison_outputs left it.
  std::vector<std::vector<std::byte>> take_outputs(bool* untouched);
  /// Of a case with repeated ids: lets the lists name a block twice. They come without, so that a
  /// result for the sets can be made before. Returns whether any list does.
  bool repeat_ids();
  /// Changes when an input changes.
  uint64_t input_hash() const;
  /// All memory that the arguments lie in.
  std::vector<HostRange> memory() const;

 private:
  struct Layout;
  Layout make_layout(DType dtype, int rank, bool any_innermost_stride, int64_t pitch);
  TensorView allocate(DType dtype, std::vector<int64_t> shape, bool is_output,
                      bool any_innermost_stride = false);
  std::array<TensorView, 2> allocate_interleaved(std::vector<int64_t> shape, bool is_output);
  TensorView place(DType dtype, const std::vector<int64_t>& shape, const Layout& layout,
                   bool is_output, int64_t extra);
  TensorView input(DType dtype, std::vector<int64_t> shape) {
    return allocate(dtype, std::move(shape), false);
  }
  TensorView output(DType dtype, std::vector<int64_t> shape) {
    return allocate(dtype, std::move(shape), true);
  }
  TensorView metadata(const std::vector<int32_t>& values);
  DType output_dtype() const { return case_.f32_outputs ? DType::kF32 : problem().dtype; }

  Batch make_batch();
  void make_page_table(Batch* batch);
  void fill_queries(const TensorView& q, int64_t heads, int64_t dim);
  void fill_keys(const TensorView& k, int64_t heads, int64_t dim, bool scored);
  void fill_rows(const TensorView& rows, int64_t count, int64_t heads, int64_t dim);
  TensorView make_keys(int64_t dim);
  std::array<TensorView, 2> make_keys_values();
  TensorView make_ids();
  TensorView make_lse(const BlockMassParams& a);
  void fill_gradient(const TensorView& rows);
  std::array<TensorView, 2> make_inverse_lists(const TensorView& ids);
  TensorView result_of(Op op, const Params& call, const char* output, const TensorView& into);
  void break_some_keys(const TensorView& k, int64_t dim);
  void break_some_rows(const TensorView& rows, int64_t heads, int64_t dim, bool keys);
  void repeat_ids(const TensorView& ids, bool ordered);
  bool spoiled(int64_t row) const {
    return case_.first_sequence_spoiled() && row < case_.sequences[0].q_len;
  }
  int64_t rank(int64_t token) const;
  float giant_value(int64_t token, int64_t d) const;
  float giant(bool query) const;

  IndexScoresParams make_index_scores();
  SelectBlocksParams make_select_blocks();
  IndexSelectParams make_index_select();
  SparseAttentionParams make_sparse_attention();
  DenseAttentionParams make_dense_attention();
  MergeParams make_merge();
  BlockListsParams make_block_lists();
  AppendPagedParams make_append_paged();
  BlockMassParams make_block_mass();
  LayerParams make_layer();
  MergeListsParams make_merge_lists();
  AttentionBackwardParams make_attention_backward();
  IndexLseParams make_index_lse();
  KlParams make_kl();

  Case case_;
  int64_t alignment_;
  bool has_results_;
  Rng rng_;
  Limits limits_;
  int64_t tokens_ = 0;      ///< T
  int64_t max_blocks_ = 0;  ///< of one sequence
  int64_t pages_ = 0;       ///< P
  Batch batch_;
  std::vector<Buffer> inputs_, outputs_;
  std::byte pattern_{};
  bool repeats_ids_ = false;
  Params params_;
};

}  // namespace msa::conformance
