// What the tensors of a case contain.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "conformance/instance.h"
#include "core/half.h"
#include "core/sequence.h"

namespace msa::conformance {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// A fixed direction: queries and keys along it have large products.
float direction(int64_t d) { return (d * 2654435761u >> 7) % 2 == 0 ? 1.0f : -1.0f; }

int64_t key_offset(const TensorView& keys, const Sequence& s, int64_t token, int64_t head) {
  const BlockRows rows = block_rows(keys, s, token / s.block_size, head);
  return (rows.data - static_cast<const std::byte*>(keys.data)) / size_of(keys.dtype) +
         token % s.block_size * rows.token_stride;
}

void set_i32(const TensorView& view, int64_t offset, int64_t value) {
  view.at<int32_t>()[offset] = static_cast<int32_t>(value);
}

}  // namespace

Batch Instance::make_batch() {
  std::vector<int32_t> cu_q{0}, cu_k{0}, lens, q_offset, block_offset;
  for (const SequenceSize& s : case_.sequences) {
    cu_q.push_back(cu_q.back() + s.q_len);
    cu_k.push_back(cu_k.back() + s.kv_len);
    lens.push_back(s.kv_len);
    q_offset.push_back(s.q_offset);
    block_offset.push_back(s.block_offset);
  }
  Batch batch{.cu_seqlens_q = metadata(cu_q), .causal = case_.causal};
  if (problem().layout == KvLayout::kPaged) {
    batch.seq_lens = metadata(lens);
    if (problem().op != Op::kBlockLists) make_page_table(&batch);
  } else {
    batch.cu_seqlens_k = metadata(cu_k);
  }
  if (case_.q_offsets) batch.q_offset = metadata(q_offset);
  if (case_.block_offsets) batch.block_offset = metadata(block_offset);
  return batch;
}

/// Every block its own page, in random order among pages of nobody; full blocks of later sequences
/// may share the first one's (a common prompt). The table is the batch's own; or sequence b has row
/// rows[b] of a larger one with gaps between its columns; or all pages stand in one list, sequence
/// b's from rows[b] on.
void Instance::make_page_table(Batch* batch) {
  const int64_t block = problem().block_size;
  const int64_t sequences = static_cast<int64_t>(case_.sequences.size());
  pages_ = rng_.between(1, 3);
  for (const SequenceSize& s : case_.sequences) pages_ += (s.kv_len + block - 1) / block;
  std::vector<int64_t> free(static_cast<size_t>(pages_));
  std::iota(free.begin(), free.end(), 0);
  rng_.shuffle(free);

  const int64_t columns = std::max<int64_t>(1, max_blocks_) + rng_.between(0, 2);
  std::vector<int32_t> rows;
  TensorView table;
  if (case_.pages == PageForm::kFlatList) {
    int64_t total = 0;
    for (const SequenceSize& s : case_.sequences) {
      rows.push_back(static_cast<int32_t>(total));
      total += (s.kv_len + block - 1) / block;
    }
    table = metadata(std::vector<int32_t>(static_cast<size_t>(total), -1));
  } else if (case_.pages == PageForm::kRowsOfTable) {
    rows.resize(static_cast<size_t>(sequences + rng_.between(0, 3)));
    std::iota(rows.begin(), rows.end(), 0);
    table = metadata(std::vector<int32_t>(rows.size() * static_cast<size_t>(columns * block), -1));
    table.rank = 2;
    table.shape = {static_cast<int64_t>(rows.size()), columns};
    table.stride = {columns * block, block};
    rng_.shuffle(rows);
    rows.resize(static_cast<size_t>(sequences));
  } else {
    table = input(DType::kI32, {sequences, columns});
  }
  const auto entry = [&](int64_t b, int64_t j) {
    const int64_t row = rows.empty() ? b : rows[static_cast<size_t>(b)];
    return table.rank == 1 ? table.offset(row + j) : table.offset(row, j);
  };
  const bool share = problem().op != Op::kAppendPaged && rng_.chance(20);
  for (int64_t b = 0; b < sequences; ++b) {
    const int64_t kv_len = case_.sequences[static_cast<size_t>(b)].kv_len;
    for (int64_t j = 0; j < (kv_len + block - 1) / block; ++j) {
      const bool common =
          share && (j + 1) * block <= std::min<int64_t>(kv_len, case_.sequences[0].kv_len);
      set_i32(table, entry(b, j), common && b > 0 ? table.at<int32_t>()[entry(0, j)] : free.back());
      free.pop_back();
    }
  }
  batch->page_table = table;
  if (!rows.empty()) batch->page_rows = metadata(rows);
}

void Instance::fill_queries(const TensorView& q, int64_t heads, int64_t dim) {
  const int64_t rows = tokens_ - case_.padded_rows;
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      const float sign = case_.values == Values::kGiant && rng_.chance(50) ? -1.0f : 1.0f;
      for (int64_t d = 0; d < dim; ++d) {
        float x = rng_.normal();
        switch (case_.values) {
          case Values::kTies:
          case Values::kEqual:
            x = static_cast<float>(rng_.between(-1, 1));
            break;
          case Values::kZero:
            x = rng_.chance(50) ? 0.0f : -0.0f;
            break;
          case Values::kHuge:
            x *= 16;
            break;
          case Values::kPeaked:
            x += 0.5f * direction(d);
            break;
          case Values::kRising:
          case Values::kFalling:
            x = 0.3f * x + direction(d);
            break;
          case Values::kGiant:
            x = sign * giant(/*query=*/true) * direction(d);
            break;
          case Values::kNormal:
          case Values::kNonFinite:
            break;
        }
        store_f32(q.data, q.dtype, q.offset(t, h, d), spoiled(t) ? kNaN : x);
      }
      if (case_.values == Values::kNonFinite && is_index_op(problem().op) && rng_.chance(5))
        store_f32(q.data, q.dtype, q.offset(t, h, rng_.between(0, dim - 1)), kNaN);
    }
  }
}

/// Of kGiant: the multiple of the fixed direction that the key of a token is, -7 .. 7, and what its
/// value has in a channel. Products of 2^28 to 2^36 times that are exact in f32.
int64_t Instance::rank(int64_t token) const {
  return static_cast<int64_t>((static_cast<uint64_t>(token) * 2654435761u + case_.seed) >> 7) % 15 -
         7;
}
float Instance::giant_value(int64_t token, int64_t d) const {
  return 0.25f * static_cast<float>((rank(token) * 31 + d * 17 + 1000) % 13 - 6);
}
float Instance::giant(bool query) const {
  if (problem().dtype == DType::kF16) return query ? 0x1p15f : 0x1p13f;
  return static_cast<float>(int64_t{1} << (14 + case_.seed % 5));
}

/// The gradient of an output [T,Hq,D].
void Instance::fill_gradient(const TensorView& rows) {
  for (int64_t t = 0; t < tokens_ - case_.padded_rows; ++t)
    for (int64_t h = 0; h < rows.shape[1]; ++h)
      for (int64_t d = 0; d < rows.shape[2]; ++d)
        store_f32(rows.data, rows.dtype, rows.offset(t, h, d), spoiled(t) ? kNaN : rng_.normal());
}

void Instance::fill_keys(const TensorView& k, int64_t heads, int64_t dim, bool scored) {
  for (size_t b = 0; b < case_.sequences.size(); ++b) {
    const Sequence s = sequence(batch_, static_cast<int64_t>(b), problem().block_size);
    const int64_t peak = rng_.between(0, std::max<int64_t>(0, s.kv_len - 1));
    for (int64_t token = 0; token < s.kv_len; ++token) {
      const float place = static_cast<float>(token) / static_cast<float>(s.kv_len);
      const bool is_peak = token == peak || rng_.chance(1);
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t offset = key_offset(k, s, token, h);
        for (int64_t d = 0; d < dim; ++d) {
          float x = rng_.normal();
          if (case_.values == Values::kGiant && !scored) x = giant_value(token, d);
          switch (scored ? case_.values : Values::kNormal) {
            case Values::kTies:
              x = static_cast<float>(rng_.between(-1, 1));
              break;
            case Values::kEqual:
              x = static_cast<float>((d * 7 + h) % 3 - 1);
              break;
            case Values::kHuge:
              x *= 16;
              break;
            case Values::kPeaked:
              if (is_peak) x = 0.1f * x + 10 * direction(d);
              break;
            case Values::kRising:
              x = 0.3f * x + 6 * place * direction(d);
              break;
            case Values::kFalling:
              x = 0.3f * x + 6 * (1 - place) * direction(d);
              break;
            case Values::kGiant:
              x = static_cast<float>(rank(token)) * giant(/*query=*/false) * direction(d);
              break;
            case Values::kNormal:
            case Values::kZero:
            case Values::kNonFinite:
              break;
          }
          const bool spoiled = b == 0 && case_.first_sequence_spoiled();
          store_f32(k.data, k.dtype, offset + d, spoiled ? kNaN : x);
        }
      }
    }
  }
  if (case_.values != Values::kNonFinite || case_.first_sequence_spoiled()) return;
  if (is_index_op(problem().op))
    break_some_keys(k, dim);
  else
    break_some_rows(k, heads, dim, scored);
}

/// NaN in the last key, NaN and infinities in values anywhere: none of the queries that do not see
/// the token may notice.
void Instance::break_some_rows(const TensorView& rows, int64_t heads, int64_t dim, bool keys) {
  for (size_t b = 0; b < case_.sequences.size(); ++b) {
    const Sequence s = sequence(batch_, static_cast<int64_t>(b), problem().block_size);
    const int64_t last = s.kv_len - 1;
    for (int64_t token = 0; token < s.kv_len; ++token) {
      const bool can = keys ? token == last && token % s.block_size != 0 : rng_.chance(4);
      if (!can) continue;
      const float bad = keys ? kNaN : rng_.pick({kNaN, kNaN, kInfinity, -kInfinity});
      const int64_t offset = key_offset(rows, s, token, rng_.between(0, heads - 1));
      const bool whole_row = rng_.chance(20);
      const int64_t first = whole_row ? 0 : rng_.between(0, dim - 1);
      for (int64_t d = first; d < (whole_row ? dim : first + 1); ++d)
        store_f32(rows.data, rows.dtype, offset + d, bad);
    }
  }
}

/// NaN and infinities in visible keys: they decide the score of their token only.
void Instance::break_some_keys(const TensorView& k, int64_t dim) {
  for (size_t b = 0; b < case_.sequences.size(); ++b) {
    const Sequence s = sequence(batch_, static_cast<int64_t>(b), problem().block_size);
    for (int64_t token = 0; token < s.kv_len; ++token) {
      if (!rng_.chance(10)) continue;
      const int64_t offset = key_offset(k, s, token, 0);
      const float bad = rng_.pick({kNaN, kNaN, kInfinity, -kInfinity});
      const bool whole_row = std::isnan(bad) && rng_.chance(50);
      const int64_t first = whole_row ? 0 : rng_.between(0, dim - 1);
      for (int64_t d = first; d < (whole_row ? dim : first + 1); ++d)
        store_f32(k.data, k.dtype, offset + d, bad);
    }
    // A whole block of NaN has the score -inf, and can still be chosen.
    if (s.blocks() > 1 && rng_.chance(50)) {
      const int64_t begin = rng_.between(0, s.blocks() - 1) * s.block_size;
      for (int64_t token = begin; token < std::min(begin + s.block_size, s.kv_len); ++token)
        store_f32(k.data, k.dtype, key_offset(k, s, token, 0), kNaN);
    }
  }
}

/// Any bit patterns, for what is copied and not computed with.
void Instance::fill_rows(const TensorView& rows, int64_t count, int64_t heads, int64_t dim) {
  for (int64_t i = 0; i < count * heads * dim; ++i) {
    const int64_t d = i % dim, h = i / dim % heads, t = i / dim / heads;
    const int64_t offset = rows.rank == 3 ? rows.offset(t, h, d) : rows.offset(t, d);
    const uint64_t bits = rng_.bits();
    std::memcpy(static_cast<std::byte*>(rows.data) + offset * size_of(rows.dtype), &bits,
                static_cast<size_t>(size_of(rows.dtype)));
  }
}

TensorView Instance::make_keys(int64_t dim) {
  const int64_t block = problem().block_size;
  TensorView k;
  if (problem().layout == KvLayout::kPaged) {
    k = input(problem().dtype, {pages_, block, dim});
  } else {
    const int64_t keys = batch_.cu_seqlens_k.at<int32_t>()[batch_size(batch_)];
    k = input(problem().dtype, {keys + rng_.between(0, 3), dim});
  }
  fill_keys(k, 1, dim, /*scored=*/true);
  return k;
}

std::array<TensorView, 2> Instance::make_keys_values() {
  const Problem& p = problem();
  std::array<TensorView, 2> kv;
  if (p.layout == KvLayout::kPaged) {
    kv = allocate_interleaved({pages_, p.heads_kv, p.block_size, p.head_dim}, false);
  } else {
    const int64_t keys = batch_.cu_seqlens_k.at<int32_t>()[batch_size(batch_)];
    kv = allocate_interleaved({keys + rng_.between(0, 3), p.heads_kv, p.head_dim}, false);
  }
  fill_keys(kv[0], p.heads_kv, p.head_dim, /*scored=*/true);
  fill_keys(kv[1], p.heads_kv, p.head_dim, /*scored=*/false);
  return kv;
}

/// Puts an id of each list into its first free slot too; where no entries say which slot is whose,
/// also between the others. Returns whether there are such lists now.
bool Instance::repeat_ids() {
  if (!case_.repeated_ids || repeats_ids_) return repeats_ids_;
  std::visit(
      [&]<class P>(P& a) {
        if constexpr (requires { a.block_ids; }) {
          bool ordered = problem().op == Op::kBlockLists;
          if constexpr (requires { a.entries; }) ordered = ordered || a.entries.given();
          if (a.block_ids.given()) repeat_ids(a.block_ids, ordered);
        }
      },
      params_);
  return repeats_ids_;
}

void Instance::repeat_ids(const TensorView& ids, bool ordered) {
  const int64_t heads = ids.stride[0] == 0 ? 1 : ids.shape[0];
  for (int64_t h = 0; h < heads; ++h) {
    for (int64_t t = 0; t < tokens_ - case_.padded_rows; ++t) {
      int32_t* list = ids.at<int32_t>(h, t);
      const int64_t length = std::find(list, list + ids.shape[2], -1) - list;
      if (length == 0 || length == ids.shape[2]) continue;
      list[length] = list[rng_.between(0, length - 1)];
      if (!ordered) std::swap(list[length], list[rng_.between(0, length)]);
      if (length + 1 < ids.shape[2]) list[length + 1] = -1;
      repeats_ids_ = true;
    }
  }
}

/// Lists of any length up to K in any order, some with blocks the query does not see or that
/// another shard holds; behind the first -1 anything may follow.
TensorView Instance::make_ids() {
  const Problem& p = problem();
  TensorView ids = input(DType::kI32, {case_.shared_ids ? 1 : p.heads_kv, tokens_, p.topk});
  for (size_t b = 0; b < case_.sequences.size(); ++b) {
    const Sequence s = sequence(batch_, static_cast<int64_t>(b), p.block_size);
    for (int64_t h = 0; h < ids.shape[0]; ++h) {
      for (int64_t i = 0; i < s.q_len; ++i) {
        const bool only_visible = rng_.chance(70);
        int64_t begin = s.block0;
        int64_t end = s.block0 + (only_visible ? s.visible_blocks(i) : s.blocks());
        if (case_.block_offsets && rng_.chance(50)) begin = 0, end += 2;
        std::vector<int64_t> candidates(static_cast<size_t>(end - begin));
        std::iota(candidates.begin(), candidates.end(), begin);
        rng_.shuffle(candidates);
        const int64_t most = std::min<int64_t>(p.topk - (case_.repeated_ids ? 1 : 0), end - begin);
        candidates.resize(static_cast<size_t>(rng_.chance(75) ? most : rng_.between(0, most)));
        if (rng_.chance(60)) std::sort(candidates.begin(), candidates.end());
        candidates.push_back(-1);
        for (int64_t slot = 0; slot < p.topk; ++slot) {
          if (slot < static_cast<int64_t>(candidates.size()))
            set_i32(ids, ids.offset(h, s.q_begin + i, slot), candidates[static_cast<size_t>(slot)]);
        }
      }
    }
  }
  if (case_.shared_ids) ids.shape[0] = p.heads_kv, ids.stride[0] = 0;
  return ids;
}

}  // namespace msa::conformance
