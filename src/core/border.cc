#include "core/border.h"

#include <algorithm>
#include <utility>

#include "core/text.h"

namespace msa {
namespace {

constexpr int64_t kUnknown = -1;
constexpr int64_t kMaxPageStride = (int64_t{1} << 29) - 1;  // in bytes, it fits an int32

}  // namespace

Border::Border(const Plan& plan)
    : plan_(plan),
      p_(plan.problem),
      info_(info_of(plan.problem.op)),
      paged_(p_.layout == KvLayout::kPaged) {
  bind("Hq", p_.heads_q), bind("Hkv", p_.heads_kv), bind("Hi", p_.heads_kv);
  bind("D", p_.head_dim), bind("Di", p_.index_dim), bind("Bk", p_.block_size), bind("K", p_.topk);
}

int64_t Border::extent(std::string_view letter) const {
  for (size_t i = 0; i < count_; ++i)
    if (known_[i].letter == letter) return known_[i].extent;
  return kUnknown;
}

// ---- tensors ------------------------------------------------------------------------------------

bool Border::takes(Content content, DType dtype) const {
  switch (content) {
    case Content::kRows:
      return dtype == p_.dtype;
    case Content::kWide:
      return dtype == p_.dtype || dtype == DType::kF32;
    case Content::kF32:
      return dtype == DType::kF32;
    case Content::kI32:
    case Content::kBlocks:
      return dtype == DType::kI32;
  }
  return false;
}

std::string Border::types_text(Content content) const {
  std::string out;
  for (DType dtype : {p_.dtype, DType::kF32, DType::kI32})
    if (takes(content, dtype) && out.find(name_of(dtype)) == out.npos)
      out += (out.empty() ? "" : " or ") + std::string(name_of(dtype));
  return out;
}

std::string Border::shape_text(std::string_view letters) const {
  std::string numbers;
  for_each_letter(letters, [&](std::string_view letter) {
    const int64_t known = extent(letter);
    numbers += (numbers.empty() ? "" : ",") + (known == kUnknown ? "*" : std::to_string(known));
  });
  return text("[", letters, "] = [", numbers, "]");
}

Status Border::tensor(const char* name, const TensorView& view, std::string_view letters,
                      Content content) {
  if (!view.given()) return missing(name, letters, content);
  if (!takes(content, view.dtype))
    return invalid(name, ": got dtype ", name_of(view.dtype), ", expected ", types_text(content));
  if (view.device != p_.device)
    return invalid(name, ": got device kind ", static_cast<int>(view.device.kind), " id ",
                   view.device.id, ", expected the problem's, kind ",
                   static_cast<int>(p_.device.kind), " id ", p_.device.id);
  size_t rank = 0;
  bool fits = true;
  bool empty = false;
  for_each_letter(letters, [&](std::string_view letter) {
    if (rank < kMaxRank) {
      const int64_t given = view.shape[rank], known = extent(letter);
      fits = fits && given >= 0 && (known == kUnknown || given == known);
      empty = empty || given == 0;
    }
    ++rank;
  });
  if (view.rank != static_cast<int32_t>(rank) || !fits) {
    std::string given;
    for (int i = 0; i < std::min(view.rank, kMaxRank); ++i)
      given += (i == 0 ? "" : ",") + std::to_string(view.shape[static_cast<size_t>(i)]);
    return invalid(name, ": got rank ", view.rank, " shape [", given, "], expected ",
                   shape_text(letters));
  }
  if (view.data == nullptr && !empty)
    return invalid(name, ": got null data, expected the elements of [", letters, "]");
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size_of(view.dtype)) != 0)
    return invalid(name, ": got an address that is not a multiple of ", size_of(view.dtype),
                   ", the size of ", name_of(view.dtype));
  rank = 0;
  for_each_letter(letters, [&](std::string_view letter) {
    if (extent(letter) == kUnknown) bind(letter, view.shape[rank]);
    ++rank;
  });
  return {};
}

Status Border::missing(const char* name, std::string_view letters, Content content) const {
  return invalid(name, ": not given, expected [", letters, "] of ", types_text(content));
}

Status Border::unit_stride(const char* name, const TensorView& view) const {
  const size_t last = static_cast<size_t>(view.rank - 1);
  if (view.shape[last] <= 1 || view.stride[last] == 1) return {};
  return invalid(name, ": got innermost stride ", view.stride[last], ", expected 1");
}

Status Border::number_entries() {
  const int64_t entries = extent("T") * p_.topk;
  if (entries > INT32_MAX)
    return invalid("block_ids: got T*K = ", entries, ", expected a product below 2^31");
  bind("T*K", entries);
  return {};
}

Status Border::argument(const Argument& argument, const TensorView& view) {
  const char* name = argument.name;
  if (argument.role == Role::kAbsent) {
    if (!view.given()) return {};
    return invalid(name, ": given, ", info_.name, " takes none");
  }
  const bool required = argument.role == Role::kInput || argument.role == Role::kOutput;
  if (!required && !view.given()) return {};
  const std::string_view letters = argument.letters(paged_);
  MSA_TRY(tensor(name, view, letters, argument.content));
  if (argument.content == Content::kBlocks && info_.entries) MSA_TRY(number_entries());
  if (!argument.any_strides) MSA_TRY(unit_stride(name, view));
  for (size_t i = 0; argument.is_written() && i < static_cast<size_t>(view.rank); ++i) {
    if (view.shape[i] > 1 && view.stride[i] == 0 && view.numel() > 0)
      return invalid(name, ": got stride 0 on axis ", i, " of extent ", view.shape[i],
                     ", expected outputs that do not overlap");
  }
  // A column per block of the longest sequence, or more.
  if (argument.is_written() && view.rank == 3 && view.shape[2] < most_blocks_ &&
      argument.has_letter("blocks"))
    return invalid(name, ": got ", view.shape[2], " columns, the longest sequence has ",
                   most_blocks_, " blocks");
  return {};
}

Status Border::at_most(const char* name, int64_t value, const char* limit, int64_t most) const {
  if (value <= most) return {};
  return invalid(name, ": got ", value, ", the plan's ", limit, " is ", most);
}

Status Border::limits() const {
  MSA_TRY(at_most("T", extent("T"), "max_tokens", plan_.limits.max_tokens));
  if (info_.has_batch() || extent("blocks") == kUnknown) return {};
  return at_most("blocks", extent("blocks"), "max_seqlen_k in blocks",
                 (plan_.limits.max_seqlen_k + p_.block_size - 1) / p_.block_size);
}

// ---- batch --------------------------------------------------------------------------------------

Status Border::vector(const char* name, const TensorView& view, std::string_view letters) {
  MSA_TRY(tensor(name, view, letters, Content::kI32));
  return unit_stride(name, view);
}

Status Border::metadata(const Batch& batch) {
  MSA_TRY(vector("cu_seqlens_q", batch.cu_seqlens_q, "B+1"));
  if (extent("B+1") < 1) return invalid("cu_seqlens_q: got 0 elements, expected [B+1]");
  bind("B", extent("B+1") - 1);
  MSA_TRY(at_most("B", extent("B"), "max_batch", plan_.limits.max_batch));
  if (paged_) {
    MSA_TRY(vector("seq_lens", batch.seq_lens, "B"));
    if (batch.cu_seqlens_k.given())
      return invalid("cu_seqlens_k: given, expected seq_lens alone with paged keys");
    MSA_TRY(page_table(batch));
  } else {
    MSA_TRY(vector("cu_seqlens_k", batch.cu_seqlens_k, "B+1"));
    for (const auto& [name, view] : {std::pair("seq_lens", &batch.seq_lens),
                                     {"page_table", &batch.page_table},
                                     {"page_rows", &batch.page_rows}})
      if (view->given())
        return invalid(name, ": given, expected cu_seqlens_k alone with packed keys");
  }
  if (batch.q_offset.given()) MSA_TRY(vector("q_offset", batch.q_offset, "B"));
  if (batch.block_offset.given()) MSA_TRY(vector("block_offset", batch.block_offset, "B"));
  return {};
}

/// The table's strides are free, so that it may be a part of a larger one.
Status Border::page_table(const Batch& batch) {
  const TensorView& table = batch.page_table;
  const bool rows = batch.page_rows.given();
  if (rows) MSA_TRY(tensor("page_rows", batch.page_rows, "B", Content::kI32));
  if (!table.given() && !info_.pages && !rows) return {};
  const char* letters = !rows ? "B,max_pages" : table.rank == 1 ? "entries" : "rows,max_pages";
  MSA_TRY(tensor("page_table", table, letters, Content::kI32));
  const int64_t stride = table.stride[static_cast<size_t>(table.rank - 1)];
  if (stride < 0 || stride > kMaxPageStride)
    return invalid("page_table: got innermost stride ", stride, ", expected 0..", kMaxPageStride);
  return {};
}

/// `view` rises from 0 to at most `rows` (unless unknown), in steps of at most `longest`.
Status Border::prefix_sums(const char* name, const TensorView& view, int64_t rows,
                           const char* limit, int64_t longest) const {
  const int32_t* sums = view.at<const int32_t>();
  const int64_t last = view.shape[0] - 1;
  if (sums[0] != 0) return invalid(name, "[0]: got ", sums[0], ", expected 0");
  for (int64_t b = 1; b <= last; ++b) {
    const int64_t step = int64_t{sums[b]} - sums[b - 1];
    if (step < 0)
      return invalid(name, "[", b, "]: got ", sums[b], " after ", sums[b - 1],
                     ", expected ascending values");
    if (step > longest)
      return invalid(name, "[", b, "]: got a length of ", step, ", ", limit, " is ", longest);
  }
  if (rows != kUnknown && sums[last] > rows)
    return invalid(name, "[", last, "]: got ", sums[last], ", the tensor has ", rows, " rows");
  return {};
}

Status Border::lengths(const Batch& batch, int64_t b, const Sequence& s) const {
  if (paged_ && (s.kv_len < 0 || s.kv_len > plan_.limits.max_seqlen_k))
    return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected 0..", plan_.limits.max_seqlen_k,
                   " (the plan's max_seqlen_k)");
  if (p_.op == Op::kAppendPaged && s.kv_len != 0 && s.kv_len < s.q_len)
    return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected at least the ", s.q_len,
                   " new tokens (or 0 for a padded sequence)");
  if (batch.q_offset.given() && s.pos0 < 0)
    return invalid("q_offset[", b, "]: got ", s.pos0, ", expected >= 0");
  if (s.block0 < 0) return invalid("block_offset[", b, "]: got ", s.block0, ", expected >= 0");
  return {};
}

Status Border::page_row(const Batch& batch, int64_t b) const {
  if (!batch.page_rows.given() || !batch.page_table.given()) return {};
  const int32_t row = *batch.page_rows.at<const int32_t>(b);
  const bool flat = batch.page_table.rank == 1;  // an empty sequence may begin at the end
  const int64_t last = batch.page_table.shape[0] - (flat ? 0 : 1);
  if (row >= 0 && row <= last) return {};
  return invalid("page_rows[", b, "]: got ", row, ", expected 0..", last, ", ",
                 flat ? "entries" : "rows", " of page_table");
}

/// The pages of a sequence; append_paged uses those of the new tokens only.
Status Border::pages(const Batch& batch, int64_t b, const Sequence& s) const {
  const TensorView& table = batch.page_table;
  const int64_t columns = table.rank == 1 ? table.shape[0] - *batch.page_rows.at<const int32_t>(b)
                                          : extent("max_pages");
  if (s.blocks() > columns)
    return invalid("page_table: got ", columns, table.rank == 1 ? " entries" : " columns",
                   ", sequence ", b, " needs ", s.blocks(), " for ", s.kv_len, " tokens");
  const int64_t first = p_.op == Op::kAppendPaged ? (s.kv_len - s.q_len) / p_.block_size : 0;
  for (int64_t j = std::max<int64_t>(first, 0); j < s.blocks(); ++j) {
    if (const int32_t page = s.page(j); page < 0 || page >= extent("P"))
      return invalid("page_table[", b, ",", j, "]: got ", page, ", expected 0..", extent("P") - 1);
  }
  return {};
}

Status Border::batch(const Batch& batch) {
  MSA_TRY(limits());
  MSA_TRY(metadata(batch));
  if (!host()) return {};  // contents lie where the host cannot look
  const Limits& limits = plan_.limits;
  MSA_TRY(prefix_sums("cu_seqlens_q", batch.cu_seqlens_q, extent("T"), "the plan's max_seqlen_q",
                      limits.max_seqlen_q));
  if (!paged_)
    MSA_TRY(prefix_sums("cu_seqlens_k", batch.cu_seqlens_k, extent("S"), "the plan's max_seqlen_k",
                        limits.max_seqlen_k));
  int64_t sum_of_blocks = 0;
  for (int64_t b = 0; b < extent("B"); ++b) {
    MSA_TRY(page_row(batch, b));
    const Sequence s = sequence(batch, b, p_.block_size);
    MSA_TRY(lengths(batch, b, s));
    if (paged_ && info_.pages) MSA_TRY(pages(batch, b, s));
    most_blocks_ = std::max(most_blocks_, s.blocks());
    sum_of_blocks += s.blocks();
  }
  bind("NB+1", sum_of_blocks + 1);
  return {};
}

}  // namespace msa
