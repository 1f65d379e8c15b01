#include "core/check.h"

#include <algorithm>
#include <array>
#include <bitset>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <utility>

#include "core/sequence.h"
#include "core/text.h"

namespace msa {
namespace {

constexpr int64_t kUnknown = -1;
constexpr int64_t kDecodeQLen = 16;  // most new tokens per sequence of a decoding step

/// "T,Hq,D" -> f("T"), f("Hq"), f("D")
template <class F>
void for_each_letter(std::string_view letters, const F& f) {
  while (!letters.empty()) {
    const size_t end = std::min(letters.find(','), letters.size());
    f(letters.substr(0, end));
    letters.remove_prefix(std::min(end + 1, letters.size()));
  }
}

using Types = std::initializer_list<DType>;  // the legal ones

/// What the lengths of a batch add up to.
struct Blocks {
  int64_t most = 0;  ///< of one sequence
  int64_t sum = 0;
};

std::string types_text(Types types) {
  std::string out;
  for (const DType* type = types.begin(); type != types.end(); ++type)
    if (std::find(types.begin(), type, *type) == type)  // f32 may be there twice
      out += (out.empty() ? "" : " or ") + std::string(name_of(*type));
  return out;
}

/// The checks of one call. Shapes are given in the letters of problem.h, and a letter means one
/// number throughout the call: that of the problem, or else of the first tensor that has it.
class Border {
 public:
  explicit Border(const Plan& plan) : plan_(plan), p_(plan.problem) {
    bind("Hq", p_.heads_q), bind("Hkv", p_.heads_kv), bind("Hi", p_.heads_kv);
    bind("D", p_.head_dim), bind("Di", p_.index_dim), bind("Bk", p_.block_size), bind("K", p_.topk);
  }

  void bind(std::string_view letter, int64_t extent) { known_[count_++] = {letter, extent}; }
  int64_t extent(std::string_view letter) const {
    for (size_t i = 0; i < count_; ++i)
      if (known_[i].letter == letter) return known_[i].extent;
    return kUnknown;
  }
  bool paged() const { return p_.layout == KvLayout::kPaged; }
  bool host() const { return p_.device.kind == DeviceKind::kCPU; }

  Status op(Op expected, Op or_expected) const {
    if (p_.op == expected || p_.op == or_expected) return {};
    return invalid("plan: made for ", name_of(p_.op), ", called with the arguments of ",
                   name_of(expected));
  }
  Status op(Op expected) const { return op(expected, expected); }

  Status input(const char* name, const TensorView& view, const char* letters, Types types) {
    MSA_TRY(strided(name, view, letters, types));
    const size_t last = static_cast<size_t>(view.rank - 1);
    if (view.shape[last] > 1 && view.stride[last] != 1)
      return invalid(name, ": got innermost stride ", view.stride[last], ", expected 1");
    return {};
  }
  Status output(const char* name, const TensorView& view, const char* letters, Types types) {
    MSA_TRY(input(name, view, letters, types));
    return distinct_elements(name, view);
  }
  /// Any strides, also the innermost.
  Status strided(const char* name, const TensorView& view, const char* letters, Types types);
  Status distinct_elements(const char* name, const TensorView& view) const {
    for (size_t i = 0; i < static_cast<size_t>(view.rank); ++i) {
      if (view.shape[i] > 1 && view.stride[i] == 0 && view.numel() > 0)
        return invalid(name, ": got stride 0 on axis ", i, " of extent ", view.shape[i],
                       ", expected outputs that do not overlap");
    }
    return {};
  }

  Status rows(const char* name, const TensorView& view, const char* letters) {
    return input(name, view, letters, {p_.dtype});
  }
  const char* keys() const { return paged() ? "P,Hkv,Bk,D" : "S,Hkv,D"; }
  const char* index_keys() const { return paged() ? "P,Bk,Di" : "S,Di"; }
  Status attention_outputs(const TensorView& o, const TensorView& lse) {
    MSA_TRY(output("o", o, "T,Hq,D", {p_.dtype, DType::kF32}));
    return lse.given() ? output("lse", lse, "T,Hq", {DType::kF32}) : Status();
  }
  /// Names of (token, slot) fit into an int32.
  Status bind_entries() {
    const int64_t entries = extent("T") * p_.topk;
    if (entries > INT32_MAX)
      return invalid("ids: got T*K = ", entries, ", expected a product below 2^31");
    bind("T*K", entries);
    return {};
  }
  /// A column per block of the longest sequence, or more.
  Status columns(const char* name, const TensorView& view, const Blocks& blocks) const {
    if (view.shape[2] >= blocks.most) return {};
    return invalid(name, ": got ", view.shape[2], " columns, the longest sequence has ",
                   blocks.most, " blocks");
  }
  Status lists(const TensorView& ids, const Batch& batch) {
    MSA_TRY(input("ids", ids, "Hkv,T,K", {DType::kI32}));
    return id_values(ids, batch);
  }
  Status scale(float value) const {
    if (std::isfinite(value)) return {};
    return invalid("softmax_scale: got ", value, ", expected a finite number (0 = 1/sqrt(D))");
  }
  Status tokens() const { return at_most("T", extent("T"), "max_tokens", plan_.limits.max_tokens); }
  Status at_most(const char* name, int64_t value, const char* limit, int64_t most) const {
    if (value <= most) return {};
    return invalid(name, ": got ", value, ", the plan's ", limit, " is ", most);
  }

  /// Lengths, offsets and, if `needs_pages`, the pages in use.
  Status batch(const Batch& batch, bool needs_pages, Blocks* blocks);
  /// Every id of a real row names another block of its sequence, up to the first -1.
  Status id_values(const TensorView& ids, const Batch& batch) const;
  /// row_ptr and entries, when given, are what block_lists makes of `ids`.
  Status inverse_lists(const TensorView& row_ptr, const TensorView& entries, const TensorView& ids,
                       const Batch& batch, const Blocks& blocks);

 private:
  struct Letter {
    std::string_view letter;
    int64_t extent;
  };

  std::string shape_text(std::string_view letters) const;
  Status metadata(const Batch& batch, bool needs_pages);
  Status prefix_sums(const char* name, const TensorView& view, int64_t rows, const char* limit,
                     int64_t longest) const;
  Status lengths(const Batch& batch, int64_t b, const Sequence& s) const;
  Status pages(int64_t b, const Sequence& s) const;

  const Plan& plan_;
  const Problem& p_;
  std::array<Letter, 20> known_;
  size_t count_ = 0;
};

std::string Border::shape_text(std::string_view letters) const {
  std::string numbers;
  for_each_letter(letters, [&](std::string_view letter) {
    const int64_t known = extent(letter);
    numbers += (numbers.empty() ? "" : ",") + (known == kUnknown ? "*" : std::to_string(known));
  });
  return text("[", letters, "] = [", numbers, "]");
}

Status Border::strided(const char* name, const TensorView& view, const char* letters, Types types) {
  if (!view.given())
    return invalid(name, ": not given, expected [", letters, "] of ", types_text(types));
  if (std::find(types.begin(), types.end(), view.dtype) == types.end())
    return invalid(name, ": got dtype ", name_of(view.dtype), ", expected ", types_text(types));
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

Status Border::metadata(const Batch& batch, bool needs_pages) {
  MSA_TRY(input("cu_seqlens_q", batch.cu_seqlens_q, "B+1", {DType::kI32}));
  if (extent("B+1") < 1) return invalid("cu_seqlens_q: got 0 elements, expected [B+1]");
  bind("B", extent("B+1") - 1);
  MSA_TRY(at_most("B", extent("B"), "max_batch", plan_.limits.max_batch));
  if (paged()) {
    MSA_TRY(input("seq_lens", batch.seq_lens, "B", {DType::kI32}));
    if (batch.cu_seqlens_k.given())
      return invalid("cu_seqlens_k: given, expected seq_lens alone with paged keys");
    if (needs_pages || batch.page_table.given())
      MSA_TRY(input("page_table", batch.page_table, "B,max_pages", {DType::kI32}));
  } else {
    MSA_TRY(input("cu_seqlens_k", batch.cu_seqlens_k, "B+1", {DType::kI32}));
    if (batch.seq_lens.given() || batch.page_table.given())
      return invalid(batch.seq_lens.given() ? "seq_lens" : "page_table",
                     ": given, expected cu_seqlens_k alone with packed keys");
  }
  if (batch.q_offset.given()) MSA_TRY(input("q_offset", batch.q_offset, "B", {DType::kI32}));
  if (batch.block_offset.given())
    MSA_TRY(input("block_offset", batch.block_offset, "B", {DType::kI32}));
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
  if (paged() && (s.kv_len < 0 || s.kv_len > plan_.limits.max_kv_len))
    return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected 0..", plan_.limits.max_kv_len,
                   " (the plan's max_kv_len)");
  if (p_.op == Op::kAppendPaged && s.kv_len != 0 && s.kv_len < s.q_len)
    return invalid("seq_lens[", b, "]: got ", s.kv_len, ", expected at least the ", s.q_len,
                   " new tokens (or 0 for a padded sequence)");
  if (batch.q_offset.given() && s.pos0 < 0)
    return invalid("q_offset[", b, "]: got ", s.pos0, ", expected >= 0");
  if (s.block0 < 0) return invalid("block_offset[", b, "]: got ", s.block0, ", expected >= 0");
  return {};
}

/// The pages of a sequence; append_paged uses those of the new tokens only.
Status Border::pages(int64_t b, const Sequence& s) const {
  if (s.blocks() > extent("max_pages"))
    return invalid("page_table: got ", extent("max_pages"), " columns, sequence ", b, " needs ",
                   s.blocks(), " for ", s.kv_len, " tokens");
  const int64_t first = p_.op == Op::kAppendPaged ? (s.kv_len - s.q_len) / p_.block_size : 0;
  for (int64_t j = std::max<int64_t>(first, 0); j < s.blocks(); ++j) {
    if (s.pages[j] < 0 || s.pages[j] >= extent("P"))
      return invalid("page_table[", b, ",", j, "]: got ", s.pages[j], ", expected 0..",
                     extent("P") - 1);
  }
  return {};
}

Status Border::batch(const Batch& batch, bool needs_pages, Blocks* blocks) {
  MSA_TRY(tokens());
  MSA_TRY(metadata(batch, needs_pages));
  if (!host()) return {};  // contents lie where the host cannot look
  const Limits& limits = plan_.limits;
  const char* limit = "the plan's max_q_len";
  int64_t longest = limits.max_q_len;
  if (is_decode(p_.op) && longest > kDecodeQLen) {
    limit =
        p_.op == Op::kSparseDecode ? "the most for sparse_decode" : "the most for msa_layer_decode";
    longest = kDecodeQLen;
  }
  MSA_TRY(prefix_sums("cu_seqlens_q", batch.cu_seqlens_q, extent("T"), limit, longest));
  if (!paged())
    MSA_TRY(prefix_sums("cu_seqlens_k", batch.cu_seqlens_k, extent("S"), "the plan's max_kv_len",
                        limits.max_kv_len));
  for (int64_t b = 0; b < extent("B"); ++b) {
    const Sequence s = sequence(batch, b, p_.block_size);
    MSA_TRY(lengths(batch, b, s));
    if (paged() && needs_pages) MSA_TRY(pages(b, s));
    blocks->most = std::max(blocks->most, s.blocks());
    blocks->sum += s.blocks();
  }
  return {};
}

/// visit(h, t, b, s) for the list of every real row; a list shared by all heads once.
template <class Visit>
Status for_each_list(const TensorView& ids, const Batch& batch, int64_t block_size,
                     const Visit& visit) {
  const int64_t heads = ids.stride[0] == 0 ? std::min<int64_t>(1, ids.shape[0]) : ids.shape[0];
  for (int64_t b = 0; b < batch_size(batch); ++b) {
    const Sequence s = sequence(batch, b, block_size);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = s.q_begin; t < s.q_begin + s.q_len; ++t) MSA_TRY(visit(h, t, b, s));
  }
  return {};
}

/// The first slot of list[0,n) whose block an earlier one names, or n. Ids are looked for only
/// where another one has left the mark that they share.
int64_t repeated_slot(const int32_t* list, int64_t n) {
  constexpr size_t kMarks = 4096;  // lists of 512K tokens in blocks of 128 share none
  std::bitset<kMarks> marks;
  for (int64_t i = 0; i < n; ++i) {
    const size_t mark = static_cast<size_t>(list[i]) % kMarks;
    if (marks[mark] && std::find(list, list + i, list[i]) != list + i) return i;
    marks.set(mark);
  }
  return n;
}

Status Border::id_values(const TensorView& ids, const Batch& batch) const {
  if (!host()) return {};
  return for_each_list(
      ids, batch, p_.block_size, [&](int64_t h, int64_t t, int64_t b, const Sequence& s) -> Status {
        const int64_t end = batch.block_offset.given() ? INT64_MAX : s.blocks();
        const int32_t* list = ids.at<const int32_t>(h, t);
        bool ascending = true;
        int32_t before = -1;
        int64_t n = 0;
        for (; n < p_.topk && list[n] != -1; ++n) {
          const int32_t id = list[n];
          if (id < 0 || id >= end)
            return invalid("ids[", h, ",", t, ",", n, "]: got ", id,
                           ", expected -1 or a block of sequence ", b, ", which has ", s.blocks());
          ascending &= before < id;
          before = id;
        }
        if (ascending) return {};
        const int64_t slot = repeated_slot(list, n);
        if (slot == n) return {};
        return invalid("ids[", h, ",", t, ",", slot, "]: got ", list[slot],
                       " a second time, expected distinct blocks");
      });
}

Status Border::inverse_lists(const TensorView& row_ptr, const TensorView& entries,
                             const TensorView& ids, const Batch& batch, const Blocks& blocks) {
  const int64_t topk = p_.topk;
  if (ids.given()) MSA_TRY(bind_entries());
  if (!row_ptr.given() && !entries.given()) return {};
  if (!ids.given()) return invalid("row_ptr: given, expected none without ids");
  if (host()) bind("NB+1", blocks.sum + 1);
  MSA_TRY(input("row_ptr", row_ptr, "Hkv,NB+1", {DType::kI32}));
  MSA_TRY(input("entries", entries, "Hkv,T*K", {DType::kI32}));
  if (!host()) return {};
  for (int64_t h = 0; h < p_.heads_kv; ++h) {
    const int32_t* rows = row_ptr.at<const int32_t>(h);
    const int32_t* entry = entries.at<const int32_t>(h);
    if (rows[0] != 0) return invalid("row_ptr[", h, ",0]: got ", rows[0], ", expected 0");
    int64_t row = 0, listed = 0;
    for (int64_t b = 0; b < batch_size(batch); ++b) {
      const Sequence s = sequence(batch, b, p_.block_size);
      for (int64_t t = s.q_begin; t < s.q_begin + s.q_len; ++t) {
        const int32_t* list = ids.at<const int32_t>(h, t);
        for (int64_t slot = 0; slot < topk && list[slot] != -1; ++slot)
          listed += list[slot] >= s.block0 && list[slot] - s.block0 < s.blocks() ? 1 : 0;
      }
      for (int64_t j = 0; j < s.blocks(); ++j, ++row) {
        if (rows[row + 1] < rows[row] || rows[row + 1] > entries.shape[1])
          return invalid("row_ptr[", h, ",", row + 1, "]: got ", rows[row + 1], ", expected ",
                         rows[row], "..", entries.shape[1]);
        for (int64_t i = rows[row]; i < rows[row + 1]; ++i) {
          const int64_t token = entry[i] / topk;
          const bool fits = entry[i] >= 0 && token >= s.q_begin && token < s.q_begin + s.q_len &&
                            *ids.at<const int32_t>(h, token, entry[i] % topk) - s.block0 == j &&
                            (i == rows[row] || entry[i] > entry[i - 1]);
          if (!fits)
            return invalid("entries[", h, ",", i, "]: got ", entry[i],
                           ", expected, ascending, a token*K + slot whose id is block ", j,
                           " of sequence ", b);
        }
      }
    }
    if (rows[row] != listed)
      return invalid("row_ptr[", h, ",", row, "]: got ", rows[row], ", ids list ", listed,
                     " blocks");
  }
  return {};
}

}  // namespace

Status check(const Plan& plan, const IndexScoresParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kIndexScores));
  MSA_TRY(border.rows("q_idx", a.q_idx, "T,Hi,Di"));
  MSA_TRY(border.rows("k_idx", a.k_idx, border.index_keys()));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.strided("scores", a.scores, "Hi,T,blocks", {DType::kF32}));
  MSA_TRY(border.distinct_elements("scores", a.scores));
  return border.columns("scores", a.scores, blocks);
}

Status check(const Plan& plan, const SelectBlocksParams& a) {
  Border border(plan);
  const Problem& p = plan.problem;
  MSA_TRY(border.op(Op::kSelectBlocks));
  MSA_TRY(border.strided("scores", a.scores, "Hi,T,blocks", {DType::kF32}));
  MSA_TRY(border.tokens());
  const int64_t blocks = border.extent("blocks");
  MSA_TRY(border.at_most("blocks", blocks, "max_kv_len in blocks",
                         (plan.limits.max_kv_len + p.block_size - 1) / p.block_size));
  if (a.num_valid_blocks.given()) {
    MSA_TRY(border.input("num_valid_blocks", a.num_valid_blocks, "T", {DType::kI32}));
    for (int64_t t = 0; border.host() && t < border.extent("T"); ++t) {
      const int32_t valid = *a.num_valid_blocks.at<const int32_t>(t);
      if (valid < 0 || valid > blocks)
        return invalid("num_valid_blocks[", t, "]: got ", valid, ", expected 0..", blocks,
                       " (the columns of scores)");
    }
  }
  return border.output("ids", a.ids, "Hi,T,K", {DType::kI32});
}

Status check(const Plan& plan, const IndexSelectParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kIndexSelect));
  MSA_TRY(border.rows("q_idx", a.q_idx, "T,Hi,Di"));
  MSA_TRY(border.rows("k_idx", a.k_idx, border.index_keys()));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.output("ids", a.ids, "Hi,T,K", {DType::kI32}));
  return a.scores.given() ? border.output("scores", a.scores, "Hi,T,K", {DType::kF32}) : Status();
}

Status check(const Plan& plan, const SparseAttentionParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kSparseAttention, Op::kSparseDecode));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("k", a.k, border.keys()));
  MSA_TRY(border.rows("v", a.v, border.keys()));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.attention_outputs(a.o, a.lse));
  return border.lists(a.ids, a.batch);
}

Status check(const Plan& plan, const DenseAttentionParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kDenseAttention));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("k", a.k, border.keys()));
  MSA_TRY(border.rows("v", a.v, border.keys()));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.attention_outputs(a.o, a.lse));
  if (!a.block_max.given()) return {};
  MSA_TRY(border.output("block_max", a.block_max, "Hq,T,blocks", {DType::kF32}));
  return border.columns("block_max", a.block_max, blocks);
}

Status check(const Plan& plan, const MergeParams& a) {
  Border border(plan);
  MSA_TRY(border.op(Op::kMerge));
  MSA_TRY(border.input("o_parts", a.o_parts, "parts,T,Hq,D", {plan.problem.dtype, DType::kF32}));
  if (border.extent("parts") < 1) return invalid("o_parts: got 0 parts, expected at least 1");
  MSA_TRY(border.tokens());
  MSA_TRY(border.input("lse_parts", a.lse_parts, "parts,T,Hq", {DType::kF32}));
  return border.attention_outputs(a.o, a.lse);
}

Status check(const Plan& plan, const BlockListsParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kBlockLists));
  MSA_TRY(border.input("ids", a.ids, "Hkv,T,K", {DType::kI32}));
  MSA_TRY(border.batch(a.batch, false, &blocks));
  MSA_TRY(border.bind_entries());
  if (border.host()) border.bind("NB+1", blocks.sum + 1);
  MSA_TRY(border.output("row_ptr", a.row_ptr, "Hkv,NB+1", {DType::kI32}));
  MSA_TRY(border.output("entries", a.entries, "Hkv,T*K", {DType::kI32}));
  return border.id_values(a.ids, a.batch);
}

Status check(const Plan& plan, const AppendPagedParams& a) {
  Border border(plan);
  Blocks blocks;
  const DType dtype = plan.problem.dtype;
  MSA_TRY(border.op(Op::kAppendPaged));
  const bool has_kv = a.k.given() || a.v.given();
  if (!has_kv && !a.k_idx.given())
    return invalid("k: not given, nor k_idx, expected at least one of them");
  if (has_kv) {
    MSA_TRY(border.rows("k", a.k, "T,Hkv,D"));
    MSA_TRY(border.rows("v", a.v, "T,Hkv,D"));
    MSA_TRY(border.output("k_pages", a.k_pages, "P,Hkv,Bk,D", {dtype}));
    MSA_TRY(border.output("v_pages", a.v_pages, "P,Hkv,Bk,D", {dtype}));
  }
  if (a.k_idx.given()) {
    MSA_TRY(border.rows("k_idx", a.k_idx, "T,Di"));
    MSA_TRY(border.output("k_idx_pages", a.k_idx_pages, "P,Bk,Di", {dtype}));
  }
  return border.batch(a.batch, true, &blocks);
}

Status check(const Plan& plan, const BlockMassParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kBlockMass));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("k", a.k, border.keys()));
  MSA_TRY(border.input("lse", a.lse, "T,Hq", {DType::kF32}));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.output("mass", a.mass, "Hkv,T,blocks", {DType::kF32}));
  return border.columns("mass", a.mass, blocks);
}

Status check(const Plan& plan, const LayerDecodeParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kLayerDecode));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("q_idx", a.q_idx, "T,Hi,Di"));
  MSA_TRY(border.rows("k", a.k, border.keys()));
  MSA_TRY(border.rows("v", a.v, border.keys()));
  MSA_TRY(border.rows("k_idx", a.k_idx, border.index_keys()));
  MSA_TRY(border.batch(a.batch, true, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.attention_outputs(a.o, a.lse));
  return a.ids.given() ? border.output("ids", a.ids, "Hkv,T,K", {DType::kI32}) : Status();
}

Status check(const Plan& plan, const AttentionBackwardParams& a) {
  Border border(plan);
  Blocks blocks;
  const DType dtype = plan.problem.dtype;
  MSA_TRY(border.op(Op::kSparseAttentionBackward, Op::kDenseAttentionBackward));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("k", a.k, "S,Hkv,D"));
  MSA_TRY(border.rows("v", a.v, "S,Hkv,D"));
  MSA_TRY(border.input("o", a.o, "T,Hq,D", {dtype, DType::kF32}));
  MSA_TRY(border.input("lse", a.lse, "T,Hq", {DType::kF32}));
  MSA_TRY(border.input("d_o", a.d_o, "T,Hq,D", {dtype, DType::kF32}));
  MSA_TRY(border.batch(a.batch, false, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  MSA_TRY(border.output("dq", a.dq, "T,Hq,D", {dtype, DType::kF32}));
  MSA_TRY(border.output("dk", a.dk, "S,Hkv,D", {dtype, DType::kF32}));
  MSA_TRY(border.output("dv", a.dv, "S,Hkv,D", {dtype, DType::kF32}));
  if (plan.problem.op == Op::kDenseAttentionBackward) {
    for (const auto& [name, view] :
         {std::pair{"ids", &a.ids}, {"row_ptr", &a.row_ptr}, {"entries", &a.entries}})
      if (view->given()) return invalid(name, ": given, dense_attention_backward takes none");
    return {};
  }
  MSA_TRY(border.lists(a.ids, a.batch));
  return border.inverse_lists(a.row_ptr, a.entries, a.ids, a.batch, blocks);
}

Status check(const Plan& plan, const IndexLseParams& a) {
  Border border(plan);
  Blocks blocks;
  MSA_TRY(border.op(Op::kIndexLse));
  MSA_TRY(border.rows("q_idx", a.q_idx, "T,Hi,Di"));
  MSA_TRY(border.rows("k_idx", a.k_idx, "S,Di"));
  MSA_TRY(border.batch(a.batch, false, &blocks));
  MSA_TRY(border.output("lse", a.lse, "T,Hi", {DType::kF32}));
  return a.ids.given() ? border.lists(a.ids, a.batch) : Status();
}

Status check(const Plan& plan, const KlParams& a) {
  Border border(plan);
  Blocks blocks;
  const DType dtype = plan.problem.dtype;
  MSA_TRY(border.op(Op::kKlBackward, Op::kKlLoss));
  MSA_TRY(border.rows("q", a.q, "T,Hq,D"));
  MSA_TRY(border.rows("k", a.k, "S,Hkv,D"));
  MSA_TRY(border.input("lse", a.lse, "T,Hq", {DType::kF32}));
  MSA_TRY(border.rows("q_idx", a.q_idx, "T,Hi,Di"));
  MSA_TRY(border.rows("k_idx", a.k_idx, "S,Di"));
  MSA_TRY(border.input("index_lse", a.index_lse, "T,Hi", {DType::kF32}));
  MSA_TRY(border.batch(a.batch, false, &blocks));
  MSA_TRY(border.scale(a.softmax_scale));
  const bool loss = plan.problem.op == Op::kKlLoss;
  if (loss || a.kl.given()) MSA_TRY(border.output("kl", a.kl, "T,Hi", {DType::kF32}));
  if (loss) {
    if (a.dq_idx.given() || a.dk_idx.given())
      return invalid(a.dq_idx.given() ? "dq_idx" : "dk_idx", ": given, kl_loss makes no gradients");
  } else {
    MSA_TRY(border.output("dq_idx", a.dq_idx, "T,Hi,Di", {dtype, DType::kF32}));
    MSA_TRY(border.output("dk_idx", a.dk_idx, "S,Di", {dtype, DType::kF32}));
  }
  if (a.ids.given()) MSA_TRY(border.lists(a.ids, a.batch));
  return border.inverse_lists(a.row_ptr, a.entries, a.ids, a.batch, blocks);
}

}  // namespace msa
