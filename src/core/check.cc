#include "core/check.h"

#include <algorithm>
#include <bitset>
#include <cmath>
#include <cstdint>

#include "core/border.h"
#include "core/sequence.h"
#include "core/text.h"

namespace msa {
namespace {

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

/// Every id of a real row names another block of its sequence, up to the first -1.
Status id_values(const Problem& p, const TensorView& ids, const Batch& batch) {
  return for_each_list(
      ids, batch, p.block_size, [&](int64_t h, int64_t t, int64_t b, const Sequence& s) -> Status {
        const int64_t end = batch.block_offset.given() ? INT64_MAX : s.blocks();
        const int32_t* list = ids.at<const int32_t>(h, t);
        bool ascending = true;
        int32_t before = -1;
        int64_t n = 0;
        for (; n < p.topk && list[n] != -1; ++n) {
          const int32_t id = list[n];
          if (id < 0 || id >= end)
            return invalid("block_ids[", h, ",", t, ",", n, "]: got ", id,
                           ", expected -1 or a block of sequence ", b, ", which has ", s.blocks());
          ascending &= before < id;
          before = id;
        }
        if (ascending) return {};
        const int64_t slot = repeated_slot(list, n);
        if (slot == n) return {};
        return invalid("block_ids[", h, ",", t, ",", slot, "]: got ", list[slot],
                       " a second time, expected distinct blocks");
      });
}

/// row_ptr [Hkv,NB+1] and entries [Hkv,T*K] are the inverse of ids.
Status inverse_values(const Problem& p, const TensorView& row_ptr, const TensorView& entries,
                      const TensorView& ids, const Batch& batch) {
  const int64_t topk = p.topk;
  for (int64_t h = 0; h < p.heads_kv; ++h) {
    const int32_t* rows = row_ptr.at<const int32_t>(h);
    const int32_t* entry = entries.at<const int32_t>(h);
    if (rows[0] != 0) return invalid("row_ptr[", h, ",0]: got ", rows[0], ", expected 0");
    int64_t row = 0, listed = 0;
    for (int64_t b = 0; b < batch_size(batch); ++b) {
      const Sequence s = sequence(batch, b, p.block_size);
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

const TensorView& view(const Border& border, const ParamsRef& params, const char* name) {
  return border.info().find(name)->in(params.data());
}

Status require(const Border& border, const ParamsRef& params, const char* name) {
  const Argument& argument = *border.info().find(name);
  return argument.in(params.data()).given() ? Status() : border.missing(argument);
}

Status check_batch(Border* border, const void* params) {
  const OpInfo& info = border->info();
  MSA_TRY(border->batch(info.batch_in(params)));
  if (info.softmax_scale == OpInfo::kNone) return {};
  const float scale =
      *reinterpret_cast<const float*>(static_cast<const std::byte*>(params) + info.softmax_scale);
  if (std::isfinite(scale)) return {};
  return invalid("softmax_scale: got ", scale, ", expected a finite number (0 = 1/sqrt(D))");
}

}  // namespace

Status check(const Plan& plan, const ParamsRef& params) {
  Border border(plan);
  const OpInfo& info = border.info();
  const void* data = params.data();
  if (info.params != params.op())
    return invalid("plan: made for ", info.name, ", called with the arguments of ",
                   name_of(params.op()));
  // The pages are looked at before the batch that names them.
  for (const Argument& a : info.arguments)
    if (a.role == Role::kUpdated) MSA_TRY(border.argument(a, a.in(data)));
  for (const Argument& a : info.arguments) {
    if (a.role == Role::kBatch)
      MSA_TRY(check_batch(&border, data));
    else if (a.role != Role::kUpdated)
      MSA_TRY(border.argument(a, a.in(data)));
    if (!info.has_batch()) MSA_TRY(border.limits());
  }
  for (const Argument& a : info.arguments) {
    const bool lists = a.is_tensor() && a.content == Content::kBlocks && !a.is_written();
    if (lists && border.host() && a.in(data).given())
      MSA_TRY(id_values(plan.problem, a.in(data), info.batch_in(data)));
  }
  return info.check != nullptr ? info.check(border, params) : Status();
}

Status check_select_blocks(const Border& border, const ParamsRef& params) {
  const auto& a = params.as<SelectBlocksParams>();
  if (!a.num_valid_blocks.given() || !border.host()) return {};
  const int64_t blocks = border.extent("blocks");
  for (int64_t t = 0; t < border.extent("T"); ++t) {
    const int32_t valid = *a.num_valid_blocks.at<const int32_t>(t);
    if (valid < 0 || valid > blocks)
      return invalid("num_valid_blocks[", t, "]: got ", valid, ", expected 0..", blocks,
                     " (the columns of scores)");
  }
  return {};
}

Status check_parts(const Border& border, const ParamsRef&) {
  if (border.extent("parts") >= 1) return {};
  return invalid(border.info().arguments[0].name, ": got 0 parts, expected at least 1");
}

Status check_append_paged(const Border& border, const ParamsRef& params) {
  const bool kv = view(border, params, "k").given() || view(border, params, "v").given();
  const bool k_idx = view(border, params, "k_idx").given();
  if (!kv && !k_idx) return invalid("k: not given, nor k_idx, expected at least one of them");
  for (const char* name : {"k", "v", "k_pages", "v_pages"})
    if (kv) MSA_TRY(require(border, params, name));
  return k_idx ? require(border, params, "k_idx_pages") : Status();
}

Status check_inverse_lists(const Border& border, const ParamsRef& params) {
  const TensorView& row_ptr = view(border, params, "row_ptr");
  const TensorView& entries = view(border, params, "entries");
  const TensorView& ids = view(border, params, "block_ids");
  if (!row_ptr.given() && !entries.given()) return {};
  if (!ids.given()) return invalid("row_ptr: given, expected none without ids");
  for (const char* name : {"row_ptr", "entries"}) MSA_TRY(require(border, params, name));
  if (!border.host()) return {};
  return inverse_values(border.problem(), row_ptr, entries, ids,
                        border.info().batch_in(params.data()));
}

}  // namespace msa
