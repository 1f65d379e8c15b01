// The checks of one call that its tables allow: shapes, dtypes, strides, and the metadata of the
// batch.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "core/op_table.h"
#include "core/sequence.h"

namespace msa {

/// Shapes are given in the letters of problem.h, and a letter means one number throughout the call:
/// that of the problem, or else of the first tensor that has it.
class Border {
 public:
  explicit Border(const Plan& plan);

  const Problem& problem() const { return p_; }
  const OpInfo& info() const { return info_; }
  bool host() const { return p_.device.kind == DeviceKind::kCPU; }
  /// What a letter means, or -1.
  int64_t extent(std::string_view letter) const;

  /// One tensor, by its role, content and shape.
  Status argument(const Argument& argument, const TensorView& view);
  /// Lengths, offsets and, where an argument has pages, the pages in use.
  Status batch(const Batch& batch);
  /// The error of an argument that must be given.
  Status missing(const Argument& argument) const {
    return missing(argument.name, argument.letters(paged_), argument.content);
  }
  /// T and, without a batch, the columns of scores, as far as known, against the limits.
  Status limits() const;

 private:
  struct Letter {
    std::string_view letter;
    int64_t extent;
  };

  void bind(std::string_view letter, int64_t extent) { known_[count_++] = {letter, extent}; }
  /// Binds T*K, once the lists are known: names of (token, slot) fit into an int32.
  Status number_entries();
  bool takes(Content content, DType dtype) const;
  std::string types_text(Content content) const;
  std::string shape_text(std::string_view letters) const;
  Status missing(const char* name, std::string_view letters, Content content) const;
  Status tensor(const char* name, const TensorView& view, std::string_view letters,
                Content content);
  Status unit_stride(const char* name, const TensorView& view) const;
  Status at_most(const char* name, int64_t value, const char* limit, int64_t most) const;
  Status metadata(const Batch& batch);
  Status prefix_sums(const char* name, const TensorView& view, int64_t rows, const char* limit,
                     int64_t longest) const;
  Status lengths(const Batch& batch, int64_t b, const Sequence& s) const;
  Status page_table(const Batch& batch);
  Status page_row(const Batch& batch, int64_t b) const;
  Status pages(const Batch& batch, int64_t b, const Sequence& s) const;
  Status vector(const char* name, const TensorView& view, std::string_view letters);

  const Plan& plan_;
  const Problem& p_;
  const OpInfo& info_;
  bool paged_;
  int64_t most_blocks_ = 0;  ///< of the longest sequence; in host memory only
  std::array<Letter, 20> known_;
  size_t count_ = 0;
};

}  // namespace msa
