#include "conformance/instance.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>

#include "conformance/judge.h"
#include "core/half.h"
#include "core/sequence.h"

namespace msa::conformance {
namespace {

constexpr int64_t kGuard = 64;  // poisoned elements on both sides of an output
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

/// What lies where nothing may be read: NaN and +inf, or an id and length far out of range.
void fill_stale(Buffer& buffer, DType dtype) {
  const size_t size = static_cast<size_t>(size_of(dtype));
  for (size_t i = 0; i < buffer.size / size; ++i) {
    std::byte* at = buffer.data.get() + i * size;
    if (dtype == DType::kI32) {
      const int32_t absurd = i % 2 == 0 ? 0x7ffffff0 : -77;
      std::memcpy(at, &absurd, size);
    } else {
      store_f32(at, dtype, 0, i % 2 == 0 ? kNaN : kInfinity);
    }
  }
}

}  // namespace

// ---- memory ----

struct Instance::Layout {
  std::vector<size_t> order;  ///< axes, outermost first
  std::vector<int64_t> gap;   ///< free elements behind each step of an axis
  int64_t shift = 0;          ///< elements between the allocation's start and the view
};

Instance::Layout Instance::make_layout(DType dtype, int rank, bool any_innermost_stride,
                                       int64_t pitch) {
  Layout layout;
  layout.order.resize(static_cast<size_t>(rank));
  layout.gap.assign(static_cast<size_t>(rank), 0);
  std::iota(layout.order.begin(), layout.order.end(), 0);
  if (case_.strided) {
    std::vector<size_t> outer = layout.order;
    if (!any_innermost_stride) outer.pop_back();
    rng_.shuffle(outer);
    std::copy(outer.begin(), outer.end(), layout.order.begin());
    for (int64_t& gap : layout.gap) gap = rng_.pick<int64_t>({0, 0, 0, 3, 8, 16});
    if (!any_innermost_stride) layout.gap.back() = 0;
    layout.shift = rng_.pick<int64_t>({0, 0, 1, 2, 3, 8});
    if (size_of(dtype) == 2) {
      const int64_t unit = std::max<int64_t>(1, alignment_ / 2);
      for (int64_t& gap : layout.gap) gap = (gap + unit - 1) / unit * unit;
      layout.shift = (layout.shift + unit - 1) / unit * unit;
    }
  }
  // A pitch makes room behind each innermost row: for the values between the keys.
  if (rank > 1) layout.gap[layout.order[layout.order.size() - 2]] += pitch;
  return layout;
}

/// A view over a new allocation; `extra` elements more than the view itself reaches.
TensorView Instance::place(DType dtype, const std::vector<int64_t>& shape, const Layout& layout,
                           bool is_output, int64_t extra) {
  TensorView view{.dtype = dtype, .rank = static_cast<int32_t>(shape.size())};
  std::copy(shape.begin(), shape.end(), view.shape.begin());
  int64_t step = 1;
  for (size_t i = layout.order.size(); i-- > 0;) {
    const size_t axis = layout.order[i];
    view.stride[axis] = step + layout.gap[axis];
    step = view.stride[axis] * std::max<int64_t>(1, view.shape[axis]);
  }
  int64_t elements = view.numel() == 0 ? 0 : 1 + extra;
  for (size_t i = 0; i < shape.size() && view.numel() > 0; ++i)
    elements += (view.shape[i] - 1) * view.stride[i];

  const int64_t guard = is_output ? kGuard : 0;
  const int64_t size = size_of(dtype);
  const int64_t bytes = (elements + layout.shift + 2 * guard) * size;
  Buffer buffer{std::unique_ptr<std::byte[]>(new std::byte[static_cast<size_t>(bytes)]),
                static_cast<size_t>(bytes)};
  view.data = buffer.data.get() + (layout.shift + guard) * size;
  if (!is_output) fill_stale(buffer, dtype);
  (is_output ? outputs_ : inputs_).push_back(std::move(buffer));
  return view;
}

TensorView Instance::allocate(DType dtype, std::vector<int64_t> shape, bool is_output,
                              bool any_innermost_stride) {
  const Layout layout =
      make_layout(dtype, static_cast<int>(shape.size()), any_innermost_stride, /*pitch=*/0);
  return place(dtype, shape, layout, is_output, /*extra=*/0);
}

/// Two tensors of one shape: apart, or row by row beside each other in one pool.
std::array<TensorView, 2> Instance::allocate_interleaved(std::vector<int64_t> shape,
                                                         bool is_output) {
  if (!case_.strided || rng_.chance(50)) {
    const TensorView first = allocate(problem().dtype, shape, is_output);
    return {first, allocate(problem().dtype, shape, is_output)};
  }
  const int64_t dim = shape.back();
  const Layout layout = make_layout(problem().dtype, static_cast<int>(shape.size()), false, dim);
  const TensorView first = place(problem().dtype, shape, layout, is_output, dim);
  TensorView second = first;
  second.data = static_cast<std::byte*>(first.data) + dim * size_of(first.dtype);
  return {first, second};
}

TensorView Instance::metadata(const std::vector<int32_t>& values) {
  const int64_t n = static_cast<int64_t>(values.size());
  const TensorView view = place(DType::kI32, {n}, {.order = {0}, .gap = {0}, .shift = 0}, false, 0);
  std::copy(values.begin(), values.end(), view.at<int32_t>());
  return view;
}

void Instance::poison_outputs(std::byte pattern) {
  pattern_ = problem().op == Op::kAppendPaged ? std::byte{0xff} : pattern;
  for (Buffer& buffer : outputs_) std::fill_n(buffer.data.get(), buffer.size, pattern_);
}

std::vector<std::vector<std::byte>> Instance::take_outputs(bool* untouched) {
  std::vector<std::vector<std::byte>> taken;
  for (const Output& output : outputs(params_)) taken.push_back(gather(*output.view));
  for (const Output& output : outputs(params_)) {
    const size_t bytes = static_cast<size_t>(output.view->numel() * size_of(output.view->dtype));
    scatter(std::vector<std::byte>(bytes, pattern_), *output.view);
  }
  *untouched = true;
  for (const Buffer& buffer : outputs_) {
    *untouched = *untouched && std::all_of(buffer.data.get(), buffer.data.get() + buffer.size,
                                           [this](std::byte b) { return b == pattern_; });
  }
  return taken;
}

uint64_t Instance::input_hash() const {
  uint64_t hash = 0xcbf29ce484222325u;
  for (const Buffer& buffer : inputs_) {
    for (size_t i = 0; i < buffer.size; i += 2) {
      uint16_t word;
      std::memcpy(&word, buffer.data.get() + i, sizeof word);
      hash = (hash ^ word) * 0x100000001b3u;
    }
  }
  return hash;
}

std::vector<HostRange> Instance::memory() const {
  std::vector<HostRange> ranges;
  for (const std::vector<Buffer>* buffers : {&inputs_, &outputs_})
    for (const Buffer& buffer : *buffers) ranges.emplace_back(buffer.data.get(), buffer.size);
  return ranges;
}

// ---- operators ----

IndexScoresParams Instance::make_index_scores() {
  const Problem& p = problem();
  IndexScoresParams a{.q_idx = input(p.dtype, {tokens_, p.heads_kv, p.index_dim}),
                      .k_idx = make_keys(p.index_dim),
                      .batch = batch_};
  fill_queries(a.q_idx, p.heads_kv, p.index_dim);
  a.scores = allocate(DType::kF32, {p.heads_kv, tokens_, max_blocks_ + rng_.between(0, 2)},
                      /*is_output=*/true, /*any_innermost_stride=*/true);
  return a;
}

SelectBlocksParams Instance::make_select_blocks() {
  const Problem& p = problem();
  SelectBlocksParams a{.scores = allocate(DType::kF32, {p.heads_kv, tokens_, max_blocks_},
                                          /*is_output=*/false, /*any_innermost_stride=*/true),
                       .block_ids = output(DType::kI32, {p.heads_kv, tokens_, p.topk})};
  std::vector<int32_t> valid(static_cast<size_t>(tokens_), static_cast<int32_t>(max_blocks_));
  if (case_.optional) {
    for (int32_t& count : valid) count = static_cast<int32_t>(rng_.between(0, max_blocks_));
    a.num_valid_blocks = metadata(valid);
  }
  for (int64_t r = 0; r < p.heads_kv; ++r) {
    for (int64_t t = 0; t < tokens_; ++t) {
      for (int64_t j = 0; j < valid[static_cast<size_t>(t)]; ++j) {
        float x = rng_.normal();
        if (case_.values == Values::kTies) x = rng_.pick({-1.0f, -0.0f, 0.0f, 1.0f, 2.0f});
        if (case_.values == Values::kEqual) x = 0.5f;
        if (case_.values == Values::kZero) x = rng_.chance(50) ? 0.0f : -0.0f;
        if (case_.values == Values::kHuge) x *= 1e38f;
        if (case_.values == Values::kNonFinite && rng_.chance(60))
          x = rng_.pick({kNaN, -kNaN, kInfinity, -kInfinity});
        *a.scores.at<float>(r, t, j) = x;
      }
    }
  }
  return a;
}

IndexSelectParams Instance::make_index_select() {
  const Problem& p = problem();
  IndexSelectParams a{.q_idx = input(p.dtype, {tokens_, p.heads_kv, p.index_dim}),
                      .k_idx = make_keys(p.index_dim),
                      .batch = batch_,
                      .block_ids = output(DType::kI32, {p.heads_kv, tokens_, p.topk})};
  fill_queries(a.q_idx, p.heads_kv, p.index_dim);
  if (case_.optional) a.scores = output(DType::kF32, {p.heads_kv, tokens_, p.topk});
  return a;
}

SparseAttentionParams Instance::make_sparse_attention() {
  const Problem& p = problem();
  const auto [k, v] = make_keys_values();
  SparseAttentionParams a{.q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
                          .k = k,
                          .v = v,
                          .block_ids = make_ids(),
                          .batch = batch_,
                          .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f}),
                          .o = output(output_dtype(), {tokens_, p.heads_q, p.head_dim})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  if (case_.optional) a.lse = output(DType::kF32, {tokens_, p.heads_q});
  return a;
}

DenseAttentionParams Instance::make_dense_attention() {
  const Problem& p = problem();
  const auto [k, v] = make_keys_values();
  DenseAttentionParams a{.q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
                         .k = k,
                         .v = v,
                         .batch = batch_,
                         .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f}),
                         .o = output(output_dtype(), {tokens_, p.heads_q, p.head_dim})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  if (case_.optional) a.lse = output(DType::kF32, {tokens_, p.heads_q});
  if (case_.optional && rng_.chance(60))
    a.block_max = output(DType::kF32, {p.heads_q, tokens_, max_blocks_ + rng_.between(0, 2)});
  return a;
}

MergeParams Instance::make_merge() {
  const Problem& p = problem();
  const int64_t parts = rng_.between(1, 6);
  MergeParams a{.o_parts = input(rng_.chance(50) ? DType::kF32 : p.dtype,
                                 {parts, tokens_, p.heads_q, p.head_dim}),
                .lse_parts = input(DType::kF32, {parts, tokens_, p.heads_q}),
                .o = output(output_dtype(), {tokens_, p.heads_q, p.head_dim})};
  if (case_.optional) a.lse = output(DType::kF32, {tokens_, p.heads_q});
  const float spread = case_.values == Values::kHuge ? 2000.0f : 3.0f;
  for (int64_t t = 0; t < tokens_; ++t) {
    for (int64_t h = 0; h < p.heads_q; ++h) {
      const bool nothing = rng_.chance(4);
      for (int64_t i = 0; i < parts; ++i) {
        const bool empty = nothing || rng_.chance(15);  // o stays NaN and infinite there
        *a.lse_parts.at<float>(i, t, h) = empty                            ? -kInfinity
                                          : case_.values == Values::kEqual ? 1.5f
                                          : case_.values == Values::kGiant
                                              ? rng_.pick({1.4e11f, 2e11f, 2e11f, -2e11f})
                                              : spread * rng_.normal();
        for (int64_t d = 0; d < p.head_dim && !empty; ++d)
          store_f32(a.o_parts.data, a.o_parts.dtype, a.o_parts.offset(i, t, h, d), rng_.normal());
      }
    }
  }
  return a;
}

/// Lists of some of the blocks 0, 1, ..., dealt out to the parts; the padding is stale but for its
/// id. Forced blocks have +inf, in some rows more of them than fit.
MergeListsParams Instance::make_merge_lists() {
  const Problem& p = problem();
  const int64_t parts = rng_.between(1, 6);
  MergeListsParams a{.scores_parts = input(DType::kF32, {parts, p.heads_kv, tokens_, p.topk}),
                     .block_ids_parts = input(DType::kI32, {parts, p.heads_kv, tokens_, p.topk}),
                     .block_ids = output(DType::kI32, {p.heads_kv, tokens_, p.topk})};
  if (case_.optional) a.scores = output(DType::kF32, {p.heads_kv, tokens_, p.topk});
  for (int64_t r = 0; r < p.heads_kv; ++r) {
    for (int64_t t = 0; t < tokens_; ++t) {
      const bool forced = rng_.chance(20);
      for (int64_t i = 0; i < parts; ++i) {
        const int64_t count = rng_.between(0, p.topk);
        for (int64_t slot = 0; slot < p.topk; ++slot) {
          // Of block_ids_parts [..., K], id slot * parts + i: no part has another one's.
          *a.block_ids_parts.at<int32_t>(i, r, t, slot) =
              slot < count ? static_cast<int32_t>(slot * parts + i) : -1;
          if (slot >= count) continue;
          float x = rng_.normal();
          if (case_.values == Values::kTies) x = rng_.pick({-1.0f, -0.0f, 0.0f, 1.0f, 2.0f});
          if (case_.values == Values::kEqual) x = 0.5f;
          if (case_.values == Values::kHuge) x *= 1e38f;
          if (case_.values == Values::kNonFinite && rng_.chance(60))
            x = rng_.pick({kNaN, -kNaN, kInfinity, -kInfinity});
          if (forced && rng_.chance(50)) x = kInfinity;
          *a.scores_parts.at<float>(i, r, t, slot) = x;
        }
      }
    }
  }
  return a;
}

BlockListsParams Instance::make_block_lists() {
  const Problem& p = problem();
  int64_t blocks = 0;
  for (int64_t b = 0; b < batch_size(batch_); ++b)
    blocks += sequence(batch_, b, p.block_size).blocks();
  return {.block_ids = make_ids(),
          .batch = batch_,
          .row_ptr = output(DType::kI32, {p.heads_kv, blocks + 1}),
          .entries = output(DType::kI32, {p.heads_kv, tokens_ * p.topk})};
}

AppendPagedParams Instance::make_append_paged() {
  const Problem& p = problem();
  AppendPagedParams a{.batch = batch_};
  const int64_t what = rng_.between(0, 3);  // 0 keys and values, 1 index keys, else all
  if (what != 1) {
    const std::array kv = allocate_interleaved({tokens_, p.heads_kv, p.head_dim}, false);
    const std::array pages =
        allocate_interleaved({pages_, p.heads_kv, p.block_size, p.head_dim}, true);
    a.k = kv[0], a.v = kv[1], a.k_pages = pages[0], a.v_pages = pages[1];
    fill_rows(a.k, tokens_, p.heads_kv, p.head_dim);
    fill_rows(a.v, tokens_, p.heads_kv, p.head_dim);
  }
  if (what != 0) {
    a.k_idx = input(p.dtype, {tokens_, p.index_dim});
    a.k_idx_pages = output(p.dtype, {pages_, p.block_size, p.index_dim});
    fill_rows(a.k_idx, tokens_, 1, p.index_dim);
  }
  return a;
}

BlockMassParams Instance::make_block_mass() {
  const Problem& p = problem();
  const auto [k, v] = make_keys_values();
  BlockMassParams a{
      .q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
      .k = k,
      .batch = batch_,
      .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f}),
      .mass = output(DType::kF32, {p.heads_kv, tokens_, max_blocks_ + rng_.between(0, 2)})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  a.lse = make_lse(a);
  return a;
}

// ---- operators that need the results of others ----

/// Runs another operator by the judge and copies one of its outputs into an input of ours: the real
/// rows, so that those of padding stay stale.
TensorView Instance::result_of(Op op, const Params& call, const char* output,
                               const TensorView& into) {
  if (!has_results_) return into;
  Problem p = problem();
  p.op = op;
  Expected expected;
  const Status status = expect(p, limits_, call, nullptr, &expected);
  if (!status.ok()) return into;  // stale, so that the case fails
  for (const Output& made : outputs(expected.params)) {
    if (std::string_view(made.name) != output) continue;
    const bool rows = op != Op::kBlockLists;  // [T, ...]
    const int64_t count =
        rows ? into.numel() / std::max<int64_t>(1, tokens_) * (tokens_ - case_.padded_rows)
             : into.numel();
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = element_offset(*made.view, i), to = element_offset(into, i);
      if (into.dtype == DType::kI32)
        into.at<int32_t>()[to] = made.view->at<int32_t>()[from];
      else
        store_f32(into.data, into.dtype, to, made.view->at<float>()[from]);
    }
  }
  return into;
}

/// A view of nowhere, for outputs that a call by the judge shall have.
TensorView wanted(DType dtype, std::initializer_list<int64_t> shape) {
  return TensorView::contiguous(nullptr, dtype, shape);
}

/// The LSE that belongs to the mass: dense attention by the judge.
TensorView Instance::make_lse(const BlockMassParams& a) {
  const Problem& p = problem();
  const TensorView lse = input(DType::kF32, {tokens_, p.heads_q});
  return result_of(Op::kDenseAttention,
                   DenseAttentionParams{.q = a.q,
                                        .k = a.k,
                                        .v = a.k,
                                        .batch = a.batch,
                                        .softmax_scale = a.softmax_scale,
                                        .o = wanted(DType::kF32, {tokens_, p.heads_q, p.head_dim}),
                                        .lse = lse},
                   "lse", lse);
}

/// row_ptr and entries, in two of three calls.
std::array<TensorView, 2> Instance::make_inverse_lists(const TensorView& ids) {
  if (rng_.chance(33)) return {};
  int64_t blocks = 0;
  for (int64_t b = 0; b < batch_size(batch_); ++b)
    blocks += sequence(batch_, b, problem().block_size).blocks();
  const int64_t heads = problem().heads_kv;
  BlockListsParams a{.block_ids = ids,
                     .batch = batch_,
                     .row_ptr = input(DType::kI32, {heads, blocks + 1}),
                     .entries = input(DType::kI32, {heads, tokens_ * problem().topk})};
  return {result_of(Op::kBlockLists, a, "row_ptr", a.row_ptr),
          result_of(Op::kBlockLists, a, "entries", a.entries)};
}

AttentionBackwardParams Instance::make_attention_backward() {
  const Problem& p = problem();
  const bool sparse = p.op == Op::kSparseAttentionBackward;
  const auto [k, v] = make_keys_values();
  AttentionBackwardParams a{.q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
                            .k = k,
                            .v = v,
                            .batch = batch_,
                            .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  a.o = input(rng_.chance(30) ? DType::kF32 : p.dtype, {tokens_, p.heads_q, p.head_dim});
  a.lse = input(DType::kF32, {tokens_, p.heads_q});
  a.d_o = input(rng_.chance(30) ? DType::kF32 : p.dtype, {tokens_, p.heads_q, p.head_dim});
  fill_gradient(a.d_o);
  if (sparse) {
    a.block_ids = make_ids();
    const SparseAttentionParams forward{a.q, k,    v, a.block_ids, batch_, a.softmax_scale,
                                        a.o, a.lse};
    result_of(Op::kSparseAttention, forward, "o", a.o);
    result_of(Op::kSparseAttention, forward, "lse", a.lse);
    std::tie(a.row_ptr, a.entries) = std::tuple_cat(make_inverse_lists(a.block_ids));
  } else {
    const DenseAttentionParams forward{a.q, k, v, batch_, a.softmax_scale, a.o, a.lse, {}};
    result_of(Op::kDenseAttention, forward, "o", a.o);
    result_of(Op::kDenseAttention, forward, "lse", a.lse);
  }
  a.dq = output(output_dtype(), {tokens_, p.heads_q, p.head_dim});
  a.dk = output(output_dtype(), {k.shape[0], p.heads_kv, p.head_dim});
  a.dv = output(output_dtype(), {k.shape[0], p.heads_kv, p.head_dim});
  return a;
}

IndexLseParams Instance::make_index_lse() {
  const Problem& p = problem();
  IndexLseParams a{.q_idx = input(p.dtype, {tokens_, p.heads_kv, p.index_dim}),
                   .k_idx = make_keys(p.index_dim),
                   .batch = batch_,
                   .lse = output(DType::kF32, {tokens_, p.heads_kv})};
  fill_queries(a.q_idx, p.heads_kv, p.index_dim);
  if (rng_.chance(60)) a.block_ids = make_ids();
  return a;
}

KlParams Instance::make_kl() {
  const Problem& p = problem();
  const auto [k, v] = make_keys_values();
  KlParams a{.q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
             .k = k,
             .lse = input(DType::kF32, {tokens_, p.heads_q}),
             .q_idx = input(p.dtype, {tokens_, p.heads_kv, p.index_dim}),
             .k_idx = input(p.dtype, {k.shape[0], p.index_dim}),
             .index_lse = input(DType::kF32, {tokens_, p.heads_kv}),
             .batch = batch_,
             .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  fill_queries(a.q_idx, p.heads_kv, p.index_dim);
  fill_keys(a.k_idx, 1, p.index_dim, /*scored=*/true);
  const TensorView o = wanted(DType::kF32, {tokens_, p.heads_q, p.head_dim});
  if (rng_.chance(60)) {
    a.block_ids = make_ids();
    result_of(Op::kSparseAttention,
              SparseAttentionParams{a.q, k, k, a.block_ids, batch_, a.softmax_scale, o, a.lse},
              "lse", a.lse);
    if (p.op == Op::kKlBackward)
      std::tie(a.row_ptr, a.entries) = std::tuple_cat(make_inverse_lists(a.block_ids));
  } else {
    result_of(Op::kDenseAttention,
              DenseAttentionParams{a.q, k, k, batch_, a.softmax_scale, o, a.lse, {}}, "lse", a.lse);
  }
  result_of(Op::kIndexLse, IndexLseParams{a.q_idx, a.k_idx, a.block_ids, batch_, a.index_lse},
            "lse", a.index_lse);
  if (p.op == Op::kKlBackward) {
    a.dq_idx = output(output_dtype(), {tokens_, p.heads_kv, p.index_dim});
    a.dk_idx = output(output_dtype(), {k.shape[0], p.index_dim});
  }
  if (p.op == Op::kKlLoss || case_.optional) a.kl = output(DType::kF32, {tokens_, p.heads_kv});
  return a;
}

LayerParams Instance::make_layer() {
  const Problem& p = problem();
  const auto [k, v] = make_keys_values();
  LayerParams a{.q = input(p.dtype, {tokens_, p.heads_q, p.head_dim}),
                .q_idx = input(p.dtype, {tokens_, p.heads_kv, p.index_dim}),
                .k = k,
                .v = v,
                .k_idx = p.layout == KvLayout::kPaged ? make_keys(p.index_dim)
                                                      : input(p.dtype, {k.shape[0], p.index_dim}),
                .batch = batch_,
                .softmax_scale = rng_.pick({0.0f, 0.0f, 0.0f, 0.07f, -0.07f}),
                .o = output(output_dtype(), {tokens_, p.heads_q, p.head_dim})};
  fill_queries(a.q, p.heads_q, p.head_dim);
  fill_queries(a.q_idx, p.heads_kv, p.index_dim);
  if (p.layout == KvLayout::kPacked) fill_keys(a.k_idx, 1, p.index_dim, /*scored=*/true);
  if (case_.optional) a.lse = output(DType::kF32, {tokens_, p.heads_q});
  // The values are judged by the lists that were chosen; hidden ones must be beyond doubt.
  if (case_.optional || !case_.exact_scores())
    a.block_ids = output(DType::kI32, {p.heads_kv, tokens_, p.topk});
  return a;
}

Instance::Instance(const Case& c, int64_t alignment, bool results)
    : case_(c), alignment_(alignment), has_results_(results), rng_(c.seed) {
  const Problem& p = problem();
  tokens_ = c.tokens();
  limits_ = {.max_batch = static_cast<int64_t>(c.sequences.size()),
             .max_tokens = tokens_,
             .max_seqlen_q = 0,
             .max_seqlen_k = 0};
  for (const SequenceSize& s : c.sequences) {
    limits_.max_seqlen_q = std::max<int64_t>(limits_.max_seqlen_q, s.q_len);
    limits_.max_seqlen_k = std::max<int64_t>(limits_.max_seqlen_k, s.kv_len);
  }
  max_blocks_ = (limits_.max_seqlen_k + p.block_size - 1) / p.block_size;
  if (c.loose_limits) {
    limits_.max_batch += rng_.between(0, 3);
    limits_.max_tokens += rng_.between(0, 100);
    limits_.max_seqlen_q += rng_.between(0, 100);
    if (c.step) limits_.max_seqlen_q = std::min(limits_.max_seqlen_q, kDecodeTokens);
    limits_.max_seqlen_k += rng_.between(0, 1000);
  }
  batch_ = make_batch();
  switch (p.op) {
    case Op::kIndexScores:
      params_ = make_index_scores();
      break;
    case Op::kSelectBlocks:
      params_ = make_select_blocks();
      break;
    case Op::kIndexSelect:
      params_ = make_index_select();
      break;
    case Op::kSparseAttention:
      params_ = make_sparse_attention();
      break;
    case Op::kDenseAttention:
      params_ = make_dense_attention();
      break;
    case Op::kMerge:
      params_ = make_merge();
      break;
    case Op::kMergeLists:
      params_ = make_merge_lists();
      break;
    case Op::kBlockLists:
      params_ = make_block_lists();
      break;
    case Op::kAppendPaged:
      params_ = make_append_paged();
      break;
    case Op::kBlockMass:
      params_ = make_block_mass();
      break;
    case Op::kLayer:
      params_ = make_layer();
      break;
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
      params_ = make_attention_backward();
      break;
    case Op::kIndexLse:
      params_ = make_index_lse();
      break;
    case Op::kKlBackward:
    case Op::kKlLoss:
      params_ = make_kl();
      break;
  }
}

}  // namespace msa::conformance
