#include "core/check.h"

#include <cmath>
#include <cstdint>
#include <string>

#include "core/sequence.h"
#include "core/text.h"

namespace msa {
namespace {

constexpr int64_t kAny = -1;         // an extent the operator does not prescribe
constexpr int64_t kDecodeQLen = 16;  // most new tokens per sequence of sparse_decode

/// What an operator expects of one tensor.
struct Expect {
  const char* name;
  const char* letters;  ///< "[T,Hq,D]"
  std::array<int64_t, kMaxRank> shape;
  int rank;
  DType dtype;
  DType or_dtype;  ///< the same, or a second legal one
  bool any_innermost_stride = false;
};

std::string shape_text(const std::array<int64_t, kMaxRank>& shape, int rank) {
  std::string out = "[";
  for (int i = 0; i < rank; ++i) {
    const int64_t extent = shape[static_cast<size_t>(i)];
    out += (i == 0 ? "" : ",") + (extent == kAny ? "*" : std::to_string(extent));
  }
  return out + "]";
}

bool shape_matches(const TensorView& view, const Expect& expect) {
  if (view.rank != expect.rank) return false;
  for (size_t i = 0; i < static_cast<size_t>(view.rank); ++i) {
    if (view.shape[i] < 0) return false;
    if (expect.shape[i] != kAny && view.shape[i] != expect.shape[i]) return false;
  }
  return true;
}

Status check_tensor(const Device& device, const TensorView& view, const Expect& expect) {
  if (!view.given()) {
    return invalid(expect.name, ": not given, expected ", expect.letters, " of ",
                   name_of(expect.dtype));
  }
  if (view.dtype != expect.dtype && view.dtype != expect.or_dtype) {
    return invalid(expect.name, ": got dtype ", name_of(view.dtype), ", expected ",
                   name_of(expect.dtype),
                   expect.or_dtype == expect.dtype ? "" : text(" or ", name_of(expect.or_dtype)));
  }
  if (!(view.device == device)) {
    return invalid(expect.name, ": got device kind ", static_cast<int>(view.device.kind), " id ",
                   view.device.id, ", expected the problem's, kind ", static_cast<int>(device.kind),
                   " id ", device.id);
  }
  if (view.rank < 0 || view.rank > kMaxRank) {
    return invalid(expect.name, ": got rank ", view.rank, ", expected ", expect.rank);
  }
  if (!shape_matches(view, expect)) {
    return invalid(expect.name, ": got shape ", shape_text(view.shape, view.rank), ", expected ",
                   expect.letters, " = ", shape_text(expect.shape, expect.rank));
  }
  const size_t last = static_cast<size_t>(view.rank - 1);
  if (!expect.any_innermost_stride && view.shape[last] > 1 && view.stride[last] != 1) {
    return invalid(expect.name, ": got innermost stride ", view.stride[last], ", expected 1");
  }
  bool empty = false;
  for (size_t i = 0; i <= last; ++i) empty = empty || view.shape[i] == 0;
  if (view.data == nullptr && !empty) {
    return invalid(expect.name, ": got null data, expected ", shape_text(view.shape, view.rank),
                   " elements");
  }
  if (reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size_of(view.dtype)) != 0) {
    return invalid(expect.name, ": got an address that is not a multiple of ", size_of(view.dtype),
                   ", the size of ", name_of(view.dtype));
  }
  return {};
}

Status check_output(const Device& device, const TensorView& view, const Expect& expect) {
  MSA_TRY(check_tensor(device, view, expect));
  for (size_t i = 0; i < static_cast<size_t>(view.rank); ++i) {
    if (view.shape[i] > 1 && view.stride[i] == 0 && view.numel() > 0) {
      return invalid(expect.name, ": got stride 0 on axis ", i, " of extent ", view.shape[i],
                     ", expected outputs that do not overlap");
    }
  }
  return {};
}

Status at_most(const char* name, int64_t value, const char* limit_name, int64_t limit) {
  if (value <= limit) return {};
  return invalid(name, ": got ", value, ", the plan's ", limit_name, " is ", limit);
}

/// What the lengths of a batch add up to; zeros where they are not in host memory.
struct Totals {
  int64_t max_blocks = 0;  ///< most blocks of one sequence
  int64_t sum_blocks = 0;
};

/// The checks of one call. Expectations are named after the arguments and hold the plan's sizes.
class Border {
 public:
  explicit Border(const Plan& plan) : plan_(plan), p_(plan.problem) {}

  Status op(Op expected) const { return op(expected, expected); }
  Status op(Op expected, Op or_expected) const {
    if (p_.op == expected || p_.op == or_expected) return {};
    return invalid("plan: made for ", name_of(p_.op), ", called with the arguments of ",
                   name_of(expected));
  }

  /// q [T,Hq,D]-like rows of the problem's dtype.
  Status rows(const char* name, const TensorView& view, const char* letters, int64_t heads,
              int64_t dim) const {
    MSA_TRY(input(view, {name, letters, {kAny, heads, dim}, 3, p_.dtype, p_.dtype}));
    return at_most(name, view.shape[0], "max_tokens", plan_.limits.max_tokens);
  }

  Status keys(const char* name, const TensorView& view) const {
    return input(view, keys_expect(name));
  }
  Status key_pages(const char* name, const TensorView& view, int64_t pages) const {
    Expect expect = keys_expect(name);
    expect.shape[0] = pages;
    return output(view, expect);
  }
  Status index_keys(const TensorView& view) const { return input(view, index_keys_expect()); }
  Status index_key_pages(const TensorView& view, int64_t pages) const {
    Expect expect = index_keys_expect();
    expect.name = "k_idx_pages";
    expect.shape[0] = pages;
    return output(view, expect);
  }

  Status ids(const TensorView& view, int64_t tokens) const {
    return input(view, ids_expect(tokens));
  }
  Status ids_output(const TensorView& view, int64_t tokens) const {
    return output(view, ids_expect(tokens));
  }

  Status input(const TensorView& view, const Expect& expect) const {
    return check_tensor(p_.device, view, expect);
  }
  Status output(const TensorView& view, const Expect& expect) const {
    return check_output(p_.device, view, expect);
  }
  Status optional_output(const TensorView& view, const Expect& expect) const {
    return view.given() ? output(view, expect) : Status();
  }

  /// o [T,Hq,D] in the problem's dtype or f32, and the optional lse [T,Hq].
  Status attention_outputs(const TensorView& o, const TensorView& lse, int64_t tokens) const {
    MSA_TRY(
        output(o, {"o", "[T,Hq,D]", {tokens, p_.heads_q, p_.head_dim}, 3, p_.dtype, DType::kF32}));
    return optional_output(lse, lse_expect(tokens));
  }
  Expect lse_expect(int64_t tokens) const {
    return {"lse", "[T,Hq]", {tokens, p_.heads_q}, 2, DType::kF32, DType::kF32};
  }

  /// A row of one number per given block for each of `heads` x tokens, at least `blocks` wide.
  Status per_block_output(const char* name, const char* letters, const TensorView& view,
                          int64_t heads, int64_t tokens, int64_t blocks,
                          bool any_innermost_stride = false) const {
    MSA_TRY(output(
        view,
        {name, letters, {heads, tokens, kAny}, 3, DType::kF32, DType::kF32, any_innermost_stride}));
    if (view.shape[2] >= blocks) return {};
    return invalid(name, ": got ", view.shape[2], " columns, the longest sequence has ", blocks,
                   " blocks");
  }

  Status scale(float value) const {
    if (std::isfinite(value) && value >= 0) return {};
    return invalid("softmax_scale: got ", value, ", expected a finite number >= 0 (0 = 1/sqrt(D))");
  }

  /// Lengths, pages and offsets of `batch` against `tokens` query rows and `key_rows` rows or pages
  /// (kAny: only the lengths are used).
  Status batch(const Batch& batch, int64_t tokens, int64_t key_rows, Totals* totals) const;

  /// Every id of a real row names a block of its sequence, up to the first -1.
  Status id_values(const TensorView& ids, const Batch& batch) const;

 private:
  bool paged() const { return p_.layout == KvLayout::kPaged; }

  Expect keys_expect(const char* name) const {
    if (paged()) {
      return {name, "[P,Hkv,Bk,D]", {kAny, p_.heads_kv, p_.block_size, p_.head_dim},
              4,    p_.dtype,       p_.dtype};
    }
    return {name, "[S,Hkv,D]", {kAny, p_.heads_kv, p_.head_dim}, 3, p_.dtype, p_.dtype};
  }
  Expect index_keys_expect() const {
    if (paged())
      return {"k_idx", "[P,Bk,Di]", {kAny, p_.block_size, p_.index_dim}, 3, p_.dtype, p_.dtype};
    return {"k_idx", "[S,Di]", {kAny, p_.index_dim}, 2, p_.dtype, p_.dtype};
  }
  Expect ids_expect(int64_t tokens) const {
    return {"ids", "[Hkv,T,K]", {p_.heads_kv, tokens, p_.topk}, 3, DType::kI32, DType::kI32};
  }

  Status metadata_shapes(const Batch& batch, int64_t key_rows) const;
  Status prefix_sums(const char* name, const TensorView& view, int64_t rows, const char* length,
                     int64_t max_length) const;
  Status pages(const Sequence& s, int64_t b, int64_t pages) const;

  const Plan& plan_;
  const Problem& p_;
};

Status Border::metadata_shapes(const Batch& batch, int64_t key_rows) const {
  const auto vector = [](const char* name, const char* letters, int64_t extent) {
    return Expect{name, letters, {extent}, 1, DType::kI32, DType::kI32};
  };
  MSA_TRY(input(batch.cu_seqlens_q, vector("cu_seqlens_q", "[B+1]", kAny)));
  const int64_t sequences = batch_size(batch);
  if (sequences < 0) return invalid("cu_seqlens_q: got 0 elements, expected [B+1]");
  MSA_TRY(at_most("cu_seqlens_q: batch", sequences, "max_batch", plan_.limits.max_batch));
  if (paged()) {
    MSA_TRY(input(batch.seq_lens, vector("seq_lens", "[B]", sequences)));
    if (batch.cu_seqlens_k.given())
      return invalid("cu_seqlens_k: given, expected seq_lens alone with paged keys");
    if (key_rows != kAny || batch.page_table.given()) {
      MSA_TRY(
          input(batch.page_table,
                {"page_table", "[B,max_pages]", {sequences, kAny}, 2, DType::kI32, DType::kI32}));
    }
  } else {
    MSA_TRY(input(batch.cu_seqlens_k, vector("cu_seqlens_k", "[B+1]", sequences + 1)));
    if (batch.seq_lens.given() || batch.page_table.given())
      return invalid(batch.seq_lens.given() ? "seq_lens" : "page_table",
                     ": given, expected cu_seqlens_k alone with packed keys");
  }
  if (batch.q_offset.given()) MSA_TRY(input(batch.q_offset, vector("q_offset", "[B]", sequences)));
  if (batch.block_offset.given())
    MSA_TRY(input(batch.block_offset, vector("block_offset", "[B]", sequences)));
  return {};
}

/// `view` rises from 0 to at most `rows`, in steps of at most max_length.
Status Border::prefix_sums(const char* name, const TensorView& view, int64_t rows,
                           const char* length, int64_t max_length) const {
  const int32_t* sums = view.at<const int32_t>();
  if (sums[0] != 0) return invalid(name, "[0]: got ", sums[0], ", expected 0");
  for (int64_t b = 1; b < view.shape[0]; ++b) {
    const int64_t step = int64_t{sums[b]} - sums[b - 1];
    if (step < 0)
      return invalid(name, "[", b, "]: got ", sums[b], " after ", sums[b - 1],
                     ", expected ascending values");
    if (step > max_length)
      return invalid(name, "[", b, "]: got a length of ", step, ", expected at most ", length,
                     " = ", max_length);
  }
  const int64_t total = sums[view.shape[0] - 1];
  if (rows != kAny && total > rows)
    return invalid(name, "[", view.shape[0] - 1, "]: got ", total, ", the tensor has ", rows,
                   " rows");
  return {};
}

/// Pages of the blocks in use; append_paged uses those of the new tokens only.
Status Border::pages(const Sequence& s, int64_t b, int64_t pages) const {
  const int64_t first = p_.op == Op::kAppendPaged ? (s.kv_len - s.q_len) / p_.block_size : 0;
  for (int64_t j = std::max<int64_t>(first, 0); j < s.blocks(); ++j) {
    if (s.pages[j] < 0 || s.pages[j] >= pages)
      return invalid("page_table[", b, ",", j, "]: got ", s.pages[j], ", expected 0..", pages - 1);
  }
  return {};
}

Status Border::batch(const Batch& batch, int64_t tokens, int64_t key_rows, Totals* totals) const {
  MSA_TRY(metadata_shapes(batch, key_rows));
  if (p_.device.kind != DeviceKind::kCPU) return {};  // contents lie where the host cannot look

  const bool decode = p_.op == Op::kSparseDecode && plan_.limits.max_q_len > kDecodeQLen;
  MSA_TRY(prefix_sums("cu_seqlens_q", batch.cu_seqlens_q, tokens,
                      decode ? "sparse_decode's limit" : "the plan's max_q_len",
                      decode ? kDecodeQLen : plan_.limits.max_q_len));
  if (!paged()) {
    MSA_TRY(prefix_sums("cu_seqlens_k", batch.cu_seqlens_k, key_rows, "the plan's max_kv_len",
                        plan_.limits.max_kv_len));
  }
  for (int64_t b = 0; b < batch_size(batch); ++b) {
    const Sequence s = sequence(batch, b, p_.block_size);
    if (paged() && (s.kv_len < 0 || s.kv_len > plan_.limits.max_kv_len))
      return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected 0..", plan_.limits.max_kv_len,
                     " (the plan's max_kv_len)");
    if (batch.q_offset.given() && s.pos0 < 0)
      return invalid("q_offset[", b, "]: got ", s.pos0, ", expected >= 0");
    if (s.block0 < 0) return invalid("block_offset[", b, "]: got ", s.block0, ", expected >= 0");
    if (batch.page_table.given() && s.blocks() > batch.page_table.shape[1])
      return invalid("page_table: got ", batch.page_table.shape[1], " columns, sequence ", b,
                     " needs ", s.blocks(), " for ", s.kv_len, " tokens");
    if (p_.op == Op::kAppendPaged && s.kv_len != 0 && s.kv_len < s.q_len)
      return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected at least the ", s.q_len,
                     " new tokens (or 0 for a padded sequence)");
    if (s.pages != nullptr && key_rows != kAny) MSA_TRY(pages(s, b, key_rows));
    totals->max_blocks = std::max(totals->max_blocks, s.blocks());
    totals->sum_blocks += s.blocks();
  }
  return {};
}

Status Border::id_values(const TensorView& ids, const Batch& batch) const {
  if (p_.device.kind != DeviceKind::kCPU) return {};
  const int64_t lists = ids.stride[0] == 0 ? std::min<int64_t>(1, ids.shape[0]) : ids.shape[0];
  for (int64_t b = 0; b < batch_size(batch); ++b) {
    const Sequence s = sequence(batch, b, p_.block_size);
    const int64_t end = batch.block_offset.given() ? INT64_MAX : s.blocks();
    for (int64_t h = 0; h < lists; ++h) {
      for (int64_t t = s.q_begin; t < s.q_begin + s.q_len; ++t) {
        const int32_t* list = ids.at<const int32_t>(h, t);
        for (int64_t slot = 0; slot < ids.shape[2] && list[slot] != -1; ++slot) {
          if (list[slot] < 0 || list[slot] >= end)
            return invalid("ids[", h, ",", t, ",", slot, "]: got ", list[slot],
                           ", expected -1 or a block of sequence ", b, ", which has ", s.blocks());
        }
      }
    }
  }
#ifndef NDEBUG
  return check_distinct(p_, ids, batch);
#else
  return {};
#endif
}

}  // namespace

Status check_distinct(const Problem& problem, const TensorView& ids, const Batch& batch) {
  const int64_t tokens = batch.cu_seqlens_q.at<const int32_t>()[batch_size(batch)];
  const int64_t lists = ids.stride[0] == 0 ? std::min<int64_t>(1, ids.shape[0]) : ids.shape[0];
  for (int64_t h = 0; h < lists; ++h) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t* list = ids.at<const int32_t>(h, t);
      for (int64_t i = 0; i < problem.topk && list[i] != -1; ++i) {
        for (int64_t j = 0; j < i; ++j) {
          if (list[i] == list[j])
            return invalid("ids[", h, ",", t, ",", i, "]: got ", list[i],
                           " a second time, expected distinct blocks");
        }
      }
    }
  }
  return {};
}

Status check(const Plan& plan, const IndexScoresParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kIndexScores));
  MSA_TRY(border.rows("q_idx", a.q_idx, "[T,Hi,Di]", p.heads_kv, p.index_dim));
  MSA_TRY(border.index_keys(a.k_idx));
  const int64_t tokens = a.q_idx.shape[0];
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, a.k_idx.shape[0], &totals));
  return border.per_block_output("scores", "[Hi,T,blocks]", a.scores, p.heads_kv, tokens,
                                 totals.max_blocks, /*any_innermost_stride=*/true);
}

Status check(const Plan& plan, const SelectBlocksParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kSelectBlocks));
  MSA_TRY(border.input(a.scores, {"scores",
                                  "[Hi,T,blocks]",
                                  {p.heads_kv, kAny, kAny},
                                  3,
                                  DType::kF32,
                                  DType::kF32,
                                  /*any_innermost_stride=*/true}));
  const int64_t tokens = a.scores.shape[1];
  const int64_t blocks = a.scores.shape[2];
  MSA_TRY(at_most("scores: tokens", tokens, "max_tokens", plan.limits.max_tokens));
  MSA_TRY(at_most("scores: columns", blocks, "max_kv_len in blocks",
                  (plan.limits.max_kv_len + p.block_size - 1) / p.block_size));
  if (a.num_valid_blocks.given()) {
    MSA_TRY(border.input(a.num_valid_blocks,
                         {"num_valid_blocks", "[T]", {tokens}, 1, DType::kI32, DType::kI32}));
    for (int64_t t = 0; p.device.kind == DeviceKind::kCPU && t < tokens; ++t) {
      const int32_t valid = *a.num_valid_blocks.at<const int32_t>(t);
      if (valid < 0 || valid > blocks)
        return invalid("num_valid_blocks[", t, "]: got ", valid, ", expected 0..", blocks,
                       " (the columns of scores)");
    }
  }
  return border.ids_output(a.ids, tokens);
}

Status check(const Plan& plan, const IndexSelectParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kIndexSelect));
  MSA_TRY(border.rows("q_idx", a.q_idx, "[T,Hi,Di]", p.heads_kv, p.index_dim));
  MSA_TRY(border.index_keys(a.k_idx));
  const int64_t tokens = a.q_idx.shape[0];
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, a.k_idx.shape[0], &totals));
  MSA_TRY(border.ids_output(a.ids, tokens));
  return border.optional_output(
      a.scores, {"scores", "[Hi,T,K]", {p.heads_kv, tokens, p.topk}, 3, DType::kF32, DType::kF32});
}

Status check(const Plan& plan, const SparseAttentionParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kSparseAttention, Op::kSparseDecode));
  MSA_TRY(border.rows("q", a.q, "[T,Hq,D]", p.heads_q, p.head_dim));
  MSA_TRY(border.keys("k", a.k));
  MSA_TRY(border.keys("v", a.v));
  const int64_t tokens = a.q.shape[0];
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, std::min(a.k.shape[0], a.v.shape[0]), &totals));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.attention_outputs(a.o, a.lse, tokens));
  MSA_TRY(border.ids(a.ids, tokens));
  return border.id_values(a.ids, a.batch);
}

Status check(const Plan& plan, const DenseAttentionParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kDenseAttention));
  MSA_TRY(border.rows("q", a.q, "[T,Hq,D]", p.heads_q, p.head_dim));
  MSA_TRY(border.keys("k", a.k));
  MSA_TRY(border.keys("v", a.v));
  const int64_t tokens = a.q.shape[0];
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, std::min(a.k.shape[0], a.v.shape[0]), &totals));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.attention_outputs(a.o, a.lse, tokens));
  if (!a.block_max.given()) return {};
  return border.per_block_output("block_max", "[Hq,T,blocks]", a.block_max, p.heads_q, tokens,
                                 totals.max_blocks);
}

Status check(const Plan& plan, const MergeParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kMerge));
  MSA_TRY(border.input(
      a.o_parts,
      {"o_parts", "[parts,T,Hq,D]", {kAny, kAny, p.heads_q, p.head_dim}, 4, p.dtype, DType::kF32}));
  const int64_t parts = a.o_parts.shape[0];
  const int64_t tokens = a.o_parts.shape[1];
  if (parts < 1) return invalid("o_parts: got 0 parts, expected at least 1");
  MSA_TRY(at_most("o_parts: tokens", tokens, "max_tokens", plan.limits.max_tokens));
  MSA_TRY(border.input(
      a.lse_parts,
      {"lse_parts", "[parts,T,Hq]", {parts, tokens, p.heads_q}, 3, DType::kF32, DType::kF32}));
  return border.attention_outputs(a.o, a.lse, tokens);
}

Status check(const Plan& plan, const BlockListsParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kBlockLists));
  MSA_TRY(border.ids(a.ids, kAny));
  const int64_t tokens = a.ids.shape[1];
  MSA_TRY(at_most("ids: tokens", tokens, "max_tokens", plan.limits.max_tokens));
  if (tokens * p.topk > INT32_MAX)
    return invalid("ids: got ", tokens, " tokens x topk ", p.topk,
                   ", expected a product that fits 32 bits");
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, kAny, &totals));
  const int64_t rows = p.device.kind == DeviceKind::kCPU ? totals.sum_blocks + 1 : kAny;
  MSA_TRY(border.output(
      a.row_ptr, {"row_ptr", "[Hkv,NB+1]", {p.heads_kv, rows}, 2, DType::kI32, DType::kI32}));
  MSA_TRY(border.output(
      a.entries,
      {"entries", "[Hkv,T*K]", {p.heads_kv, tokens * p.topk}, 2, DType::kI32, DType::kI32}));
  return border.id_values(a.ids, a.batch);
}

Status check(const Plan& plan, const AppendPagedParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kAppendPaged));
  const bool has_kv = a.k.given() || a.v.given();
  if (!has_kv && !a.k_idx.given())
    return invalid("k: not given, nor k_idx, expected at least one of them");
  const int64_t pages = has_kv ? a.k_pages.shape[0] : a.k_idx_pages.shape[0];
  const int64_t tokens = has_kv ? a.k.shape[0] : a.k_idx.shape[0];
  if (has_kv) {
    MSA_TRY(border.rows("k", a.k, "[T,Hkv,D]", p.heads_kv, p.head_dim));
    MSA_TRY(border.input(
        a.v, {"v", "[T,Hkv,D]", {tokens, p.heads_kv, p.head_dim}, 3, p.dtype, p.dtype}));
    MSA_TRY(border.key_pages("k_pages", a.k_pages, pages));
    MSA_TRY(border.key_pages("v_pages", a.v_pages, pages));
  }
  if (a.k_idx.given()) {
    MSA_TRY(border.input(a.k_idx, {"k_idx", "[T,Di]", {tokens, p.index_dim}, 2, p.dtype, p.dtype}));
    MSA_TRY(at_most("k_idx", tokens, "max_tokens", plan.limits.max_tokens));
    MSA_TRY(border.index_key_pages(a.k_idx_pages, pages));
  }
  Totals totals;
  return border.batch(a.batch, tokens, pages, &totals);
}

Status check(const Plan& plan, const BlockMassParams& a) {
  const Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kBlockMass));
  MSA_TRY(border.rows("q", a.q, "[T,Hq,D]", p.heads_q, p.head_dim));
  MSA_TRY(border.keys("k", a.k));
  const int64_t tokens = a.q.shape[0];
  MSA_TRY(border.input(a.lse, border.lse_expect(tokens)));
  Totals totals;
  MSA_TRY(border.batch(a.batch, tokens, a.k.shape[0], &totals));
  MSA_TRY(border.scale(a.softmax_scale));
  return border.per_block_output("mass", "[Hkv,T,blocks]", a.mass, p.heads_kv, tokens,
                                 totals.max_blocks);
}

}  // namespace msa
