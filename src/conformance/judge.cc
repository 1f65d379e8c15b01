#include "conformance/judge.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <string_view>

#include "core/half.h"
#include "core/registry.h"
#include "core/text.h"
#include "reference/rows.h"

namespace msa::conformance {
namespace {

constexpr double kUnit = 0x1p-24;  // rounding of fp32, relative

// Where the tolerances come from. u = 2^-24.
//   score      A sum of n products rounds by less than n u |q||k| in any order; in practice errors
//              cancel like sqrt(n). 3 sqrt(n) + 4 leaves a factor of three.
//   logit      The same once more by scale and log2(e): u |logit| each, below u scale |q||k|.
//              No factor: |q| and |k| are the largest of the case, so few rows come near.
//   o          Errors of logits are relative errors of probabilities, twice (numerator and sum);
//              2e-5 of the row covers exp2 polynomials and the sum over keys, 4 u the rows where
//              values of order one cancel each other. 16-bit outputs round once more, half a unit
//              in the last place: 2^-8 (bf16), 2^-11 (f16).
//   rounded P  Probabilities in bf16 err by up to 2^-8 each, in both directions: 1e-2 of the row
//              (2.5 * 2^-8), and where values of order one cancel, 1e-3; the row's direction stays.
double score_error(int64_t dim, double norms) {
  return (3 * std::sqrt(static_cast<double>(dim)) + 4) * kUnit * norms;
}
double logit_error(int64_t dim, double scale, double norms) {
  return (std::sqrt(static_cast<double>(dim)) + 2) * kUnit * scale * norms;
}
double output_rounding(DType dtype) {
  return dtype == DType::kBF16 ? 0x1p-8 : dtype == DType::kF16 ? 0x1p-11 : kUnit;
}
Tolerance attention_tolerance(DType output, double logit, bool rounds_probabilities) {
  if (rounds_probabilities) {
    return {.absolute = 1e-3,
            .row = 1e-2 + 2 * logit,
            .element = output_rounding(output),
            .cosine = 0.9999 - 2 * logit};
  }
  return {.absolute = 4 * kUnit, .row = 2e-5 + 2 * logit, .element = output_rounding(output)};
}
Tolerance lse_tolerance(double logit) { return {.absolute = 1e-5 + logit, .element = 4 * kUnit}; }

/// Where an element stands, for messages: "o[3,0,17]".
std::string place(const char* name, const TensorView& view, int64_t linear) {
  std::string index;
  for (int i = view.rank - 1; i >= 0; --i) {
    const int64_t extent = view.shape[static_cast<size_t>(i)];
    index = std::to_string(linear % extent) + (index.empty() ? "" : ",") + index;
    linear /= extent;
  }
  return std::string(name) + "[" + index + "]";
}

double element(const TensorView& view, int64_t linear) {
  return load_f32(view.data, view.dtype, element_offset(view, linear));
}

void fail(Verdict* verdict, std::string text) {
  if (verdict->ok()) verdict->failure = std::move(text);
}

bool same_shape(const TensorView& a, const TensorView& b) {
  return a.rank == b.rank && a.shape == b.shape;
}

double norm(reference::Row row, int64_t n) {
  const double square = reference::dot<double>(row, row, n);
  return std::isfinite(square) ? std::sqrt(square) : 0;  // rows with NaN or infinities: no size
}

double largest_query(const TensorView& q, const Batch& batch, int64_t heads, int64_t dim) {
  double largest = 0;
  for (int64_t t = 0; t < batch.cu_seqlens_q.at<int32_t>()[batch_size(batch)]; ++t)
    for (int64_t h = 0; h < heads; ++h)
      largest = std::max(largest, norm(reference::row(q, t, h), dim));
  return largest;
}

double largest_key(const TensorView& k, const Batch& batch, int64_t block, int64_t heads,
                   int64_t dim) {
  double largest = 0;
  for (int64_t b = 0; b < batch_size(batch); ++b) {
    const Sequence s = sequence(batch, b, block);
    for (int64_t token = 0; token < s.kv_len; ++token)
      for (int64_t h = 0; h < heads; ++h)
        largest = std::max(largest, norm(reference::key_row(k, s, token, h), dim));
  }
  return largest;
}

template <class Params>
concept HasIndexRows = requires(Params a) { a.q_idx; };
template <class Params>
concept HasRows = requires(Params a) {
  a.q;
  a.softmax_scale;
};

double largest_product(const Problem& p, const Params& params) {
  return std::visit(
      [&]<class P>(const P& a) {
        if constexpr (HasIndexRows<P>) {
          return largest_query(a.q_idx, a.batch, p.heads_kv, p.index_dim) *
                 largest_key(a.k_idx, a.batch, p.block_size, 1, p.index_dim);
        } else if constexpr (HasRows<P>) {
          return largest_query(a.q, a.batch, p.heads_q, p.head_dim) *
                 largest_key(a.k, a.batch, p.block_size, p.heads_kv, p.head_dim);
        } else {
          return 0.0;
        }
      },
      params);
}

template <class Params>
double logit_error(const Problem& p, const Params& a, double norms, const Conditions& c) {
  if (c.exact_softmax) return 0;
  const double scale =
      a.softmax_scale != 0 ? std::abs(a.softmax_scale) : 1 / std::sqrt(double{1} * p.head_dim);
  return logit_error(p.head_dim, scale, norms);
}

}  // namespace

void compare_rows(const char* name, const TensorView& got, const TensorView& want,
                  const Tolerance& tolerance, Verdict* verdict) {
  if (!same_shape(got, want)) return fail(verdict, text(name, ": wrong shape"));
  if (got.data == want.data) return;  // of a part of a call, an output that is not judged
  const int64_t length = got.shape[static_cast<size_t>(got.rank - 1)];
  const int64_t rows = length == 0 ? 0 : got.numel() / length;
  for (int64_t row = 0; row < rows; ++row) {
    double magnitude = 0, gg = 0, gw = 0, ww = 0;
    for (int64_t i = row * length; i < (row + 1) * length; ++i) {
      const double g = element(got, i), w = element(want, i);
      const bool same_class = std::isnan(g) == std::isnan(w) && std::isinf(g) == std::isinf(w) &&
                              (!std::isinf(g) || g == w);
      if (!same_class)
        return fail(verdict, text(place(name, got, i), ": got ", g, ", expected ", w));
      if (!std::isfinite(w)) continue;
      magnitude = std::max(magnitude, std::abs(w));
      gg += g * g, gw += g * w, ww += w * w;
    }
    for (int64_t i = row * length; i < (row + 1) * length; ++i) {
      const double g = element(got, i), w = element(want, i);
      if (!std::isfinite(w)) continue;
      const double error = std::abs(g - w);
      const double allowed =
          tolerance.absolute + tolerance.row * magnitude + tolerance.element * std::abs(w);
      const double size = std::max(magnitude, tolerance.absolute);  // not of what cancelled
      if (size > 0) verdict->max_error = std::max(verdict->max_error, error / size);
      if (!(error <= allowed)) {
        fail(verdict, text(place(name, got, i), ": got ", g, ", expected ", w, ", error ", error,
                           " above ", allowed));
      }
    }
    if (tolerance.cosine > 0 && ww > 0 && !(gw >= tolerance.cosine * std::sqrt(gg * ww)))
      fail(verdict, text(place(name, got, row * length), ": cosine to the expected row ",
                         gw / std::sqrt(gg * ww), " below ", tolerance.cosine));
  }
}

void compare_exactly(const char* name, const TensorView& got, const TensorView& want,
                     Verdict* verdict) {
  if (!same_shape(got, want)) return fail(verdict, text(name, ": wrong shape"));
  const std::vector<std::byte> g = gather(got), w = gather(want);
  const auto [at, end] = std::mismatch(g.begin(), g.end(), w.begin());
  if (at == g.end()) return;
  const int64_t i = (at - g.begin()) / size_of(got.dtype);
  if (got.dtype == DType::kI32) {
    fail(verdict, text(place(name, got, i), ": got ", got.at<int32_t>()[element_offset(got, i)],
                       ", expected ", want.at<int32_t>()[element_offset(want, i)]));
  } else {
    fail(verdict, text(place(name, got, i), ": got ", element(got, i), ", expected ",
                       element(want, i), " bit for bit"));
  }
}

void compare_ids(const TensorView& got, const TensorView& want, const TensorView& want_scores,
                 const TensorView& scores, const std::vector<int64_t>& first_block,
                 double tolerance, Verdict* verdict) {
  if (!same_shape(got, want)) return fail(verdict, "block_ids: wrong shape");
  const int64_t k = want.shape[2];
  for (int64_t r = 0; r < want.shape[0]; ++r) {
    for (int64_t t = 0; t < want.shape[1]; ++t) {
      const int32_t* g = got.at<const int32_t>(r, t);
      const int32_t* w = want.at<const int32_t>(r, t);
      if (std::equal(g, g + k, w)) continue;
      const auto complain = [&](const std::string& what) {
        std::string lists = "got ";
        for (int64_t i = 0; i < k; ++i) lists += std::to_string(g[i]) + (i + 1 < k ? "," : "");
        lists += ", expected ";
        for (int64_t i = 0; i < k; ++i) lists += std::to_string(w[i]) + (i + 1 < k ? "," : "");
        fail(verdict, text("block_ids[", r, ",", t, "]: ", what, ": ", lists));
      };
      const int64_t valid = std::find(w, w + k, -1) - w;
      const int64_t first = first_block[static_cast<size_t>(t)];
      const auto score = [&](int32_t id) { return double{*scores.at<float>(r, t, id - first)}; };
      double best_missing = -INFINITY, worst_extra = INFINITY;
      bool legal = std::all_of(g + valid, g + k, [](int32_t id) { return id == -1; });
      for (int64_t i = 0; i < valid && legal; ++i) {
        legal = g[i] >= first && g[i] - first < scores.shape[2] && (i == 0 || g[i] > g[i - 1]);
        if (legal && std::find(w, w + valid, g[i]) == w + valid)
          worst_extra = std::min(worst_extra, score(g[i]));
        if (std::find(g, g + valid, w[i]) == g + valid)
          best_missing = std::max(best_missing, double{*want_scores.at<float>(r, t, i)});
      }
      if (!legal) {
        complain("not ascending, or not the right number");
        continue;
      }
      const double gap = best_missing - worst_extra;
      if (!(gap <= tolerance) || tolerance == 0)
        complain(text("score ", best_missing, " left out for ", worst_extra));
      else
        verdict->max_error = std::max(verdict->max_error, gap / std::abs(best_missing));
    }
  }
}

// ---- the expected outputs ----

namespace {

TensorView allocate(Expected* e, DType dtype, const std::vector<int64_t>& shape) {
  const int64_t elements =
      std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  e->memory.emplace_back(static_cast<size_t>(elements * size_of(dtype) / 8 + 1));
  TensorView view{
      .data = e->memory.back().data(), .dtype = dtype, .rank = static_cast<int32_t>(shape.size())};
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    view.shape[i] = shape[i];
    view.stride[i] = step;
    step *= shape[i];
  }
  return view;
}

Status run_reference(Problem problem, Op op, Limits limits, const Params& params,
                     Threads* threads) {
  problem.op = op;
  limits.max_threads = threads != nullptr ? threads->count() : 1;
  Plan plan;
  MSA_TRY(msa::plan(problem, limits, &plan, "reference-f64"));
  std::vector<double> memory;
  const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
  const Workspace workspace{make_workspace(bytes, &memory), bytes};
  return std::visit(
      [&](const auto& a) { return msa::run(plan, a, workspace, {.threads = threads}); }, params);
}

template <class Params>
concept Chooses = std::is_same_v<Params, IndexSelectParams> || std::is_same_v<Params, LayerParams>;

/// The chosen blocks with their scores, and the scores of all blocks: where ids differ they decide,
/// and the values are judged by the blocks that were chosen.
template <class Params>
Status expect_choice(const Params& a, Threads* threads, Expected* e) {
  const Problem& p = e->problem;
  const int64_t tokens = a.q_idx.shape[0];
  const int64_t blocks = (e->limits.max_seqlen_k + p.block_size - 1) / p.block_size;
  e->chosen = {.q_idx = a.q_idx,
               .k_idx = a.k_idx,
               .batch = a.batch,
               .block_ids = allocate(e, DType::kI32, {p.heads_kv, tokens, p.topk}),
               .scores = allocate(e, DType::kF32, {p.heads_kv, tokens, p.topk})};
  e->scores = {.q_idx = a.q_idx,
               .k_idx = a.k_idx,
               .batch = a.batch,
               .scores = allocate(e, DType::kF32, {p.heads_kv, tokens, blocks})};
  MSA_TRY(run_reference(p, Op::kIndexSelect, e->limits, e->chosen, threads));
  return run_reference(p, Op::kIndexScores, e->limits, e->scores, threads);
}

// ---- one judgement per operator ----

void judge_each(const Expected& e, const IndexScoresParams& want, const IndexScoresParams& got,
                const Conditions& c, Verdict* verdict) {
  const double error = c.exact_scores ? 0 : score_error(e.problem.index_dim, e.norms);
  compare_rows("scores", got.scores, want.scores, {.absolute = error}, verdict);
}

void judge_each(const Expected&, const SelectBlocksParams& want, const SelectBlocksParams& got,
                const Conditions&, Verdict* verdict) {
  compare_exactly("block_ids", got.block_ids, want.block_ids, verdict);
}

/// The first given block of every query row.
std::vector<int64_t> first_blocks(const Expected& e) {
  std::vector<int64_t> first(static_cast<size_t>(e.chosen.q_idx.shape[0]));
  for (size_t t = 0; t < first.size(); ++t)
    first[t] =
        reference::query_at(e.chosen.batch, static_cast<int64_t>(t), e.problem.block_size).s.block0;
  return first;
}

void judge_each(const Expected& e, const IndexSelectParams&, const IndexSelectParams& got,
                const Conditions& c, Verdict* verdict) {
  const IndexSelectParams& want = e.chosen;
  const int64_t tokens = want.block_ids.shape[1], k = want.block_ids.shape[2];
  const std::vector<int64_t> first_block = first_blocks(e);
  const double error = c.exact_scores ? 0 : score_error(e.problem.index_dim, e.norms);
  compare_ids(got.block_ids, want.block_ids, want.scores, e.scores.scores, first_block, 2 * error,
              verdict);
  if (!got.scores.given() || !verdict->ok()) return;

  // The scores that belong to the ids which were chosen.
  Expected memory{.problem = e.problem, .limits = e.limits, .params = {}};
  const TensorView scores = allocate(&memory, DType::kF32, {want.block_ids.shape[0], tokens, k});
  for (int64_t i = 0; i < scores.numel(); ++i) {
    const int64_t r = i / k / tokens, t = i / k % tokens;
    const int32_t id = *got.block_ids.at<const int32_t>(r, t, i % k);
    const int32_t* list = want.block_ids.at<const int32_t>(r, t);
    const int64_t slot = std::find(list, list + k, id) - list;
    *scores.at<float>(r, t, i % k) =
        slot < k ? *want.scores.at<float>(r, t, slot)
                 : *e.scores.scores.at<float>(r, t, id - first_block[static_cast<size_t>(t)]);
  }
  compare_rows("scores", got.scores, scores, {.absolute = error}, verdict);
}

template <class Params>
void judge_attention(const Expected& e, const Params& want, const Params& got, const Conditions& c,
                     Verdict* verdict) {
  const double logit = logit_error(e.problem, got, e.norms, c);
  compare_rows("o", got.o, want.o, attention_tolerance(got.o.dtype, logit, c.rounds_probabilities),
               verdict);
  if (got.lse.given()) compare_rows("lse", got.lse, want.lse, lse_tolerance(logit), verdict);
}

void judge_each(const Expected& e, const SparseAttentionParams& want,
                const SparseAttentionParams& got, const Conditions& c, Verdict* verdict) {
  judge_attention(e, want, got, c, verdict);
}

void judge_each(const Expected& e, const DenseAttentionParams& want,
                const DenseAttentionParams& got, const Conditions& c, Verdict* verdict) {
  judge_attention(e, want, got, c, verdict);
  const double error = c.exact_scores ? 0 : score_error(e.problem.head_dim, e.norms);
  if (got.block_max.given())
    compare_rows("block_max", got.block_max, want.block_max, {.absolute = error}, verdict);
}

void judge_each(const Expected&, const MergeParams& want, const MergeParams& got,
                const Conditions& c, Verdict* verdict) {
  // exp of differences of LSEs, each rounded by u |lse|, to which exp2 adds as much again.
  double largest = 0;
  for (int64_t i = 0; i < got.lse_parts.numel(); ++i) {
    const double lse = std::abs(element(got.lse_parts, i));
    if (std::isfinite(lse)) largest = std::max(largest, lse);
  }
  const double error = c.exact_softmax ? 0 : 4 * kUnit * largest;
  compare_rows("o", got.o, want.o, attention_tolerance(got.o.dtype, error, false), verdict);
  if (got.lse.given()) compare_rows("lse", got.lse, want.lse, lse_tolerance(0), verdict);
}

void judge_each(const Expected&, const MergeListsParams& want, const MergeListsParams& got,
                const Conditions&, Verdict* verdict) {
  compare_exactly("block_ids", got.block_ids, want.block_ids, verdict);
  if (got.scores.given()) compare_rows("scores", got.scores, want.scores, {}, verdict);
}

void judge_each(const Expected&, const BlockListsParams& want, const BlockListsParams& got,
                const Conditions&, Verdict* verdict) {
  compare_exactly("row_ptr", got.row_ptr, want.row_ptr, verdict);
  compare_exactly("entries", got.entries, want.entries, verdict);
}

void judge_each(const Expected&, const AppendPagedParams& want, const AppendPagedParams& got,
                const Conditions&, Verdict* verdict) {
  if (got.k.given()) {
    compare_exactly("k_pages", got.k_pages, want.k_pages, verdict);
    compare_exactly("v_pages", got.v_pages, want.v_pages, verdict);
  }
  if (got.k_idx.given()) compare_exactly("k_idx_pages", got.k_idx_pages, want.k_idx_pages, verdict);
}

void judge_each(const Expected& e, const BlockMassParams& want, const BlockMassParams& got,
                const Conditions& c, Verdict* verdict) {
  const double logit = logit_error(e.problem, got, e.norms, c);
  compare_rows("mass", got.mass, want.mass, {.row = 2e-5 + 2 * logit}, verdict);
}

void judge_each(const Expected& e, const LayerParams&, const LayerParams& got, const Conditions& c,
                Verdict* verdict) {
  const Problem& p = e.problem;
  if (got.block_ids.given()) {
    const double error = c.exact_scores ? 0 : 2 * score_error(p.index_dim, e.norms);
    compare_ids(got.block_ids, e.chosen.block_ids, e.chosen.scores, e.scores.scores,
                first_blocks(e), error, verdict);
    if (!verdict->ok()) return;  // the ids may be anything
  }
  Expected values{.problem = p,
                  .limits = e.limits,
                  .params = {},
                  .norms = largest_query(got.q, got.batch, p.heads_q, p.head_dim) *
                           largest_key(got.k, got.batch, p.block_size, p.heads_kv, p.head_dim)};
  const SparseAttentionParams want{
      .q = got.q,
      .k = got.k,
      .v = got.v,
      .block_ids = got.block_ids.given() ? got.block_ids : e.chosen.block_ids,
      .batch = got.batch,
      .softmax_scale = got.softmax_scale,
      .o = allocate(&values, DType::kF32, {got.o.shape[0], p.heads_q, p.head_dim}),
      .lse = allocate(&values, DType::kF32, {got.o.shape[0], p.heads_q})};
  if (const Status status = run_reference(p, Op::kSparseAttention, e.limits, want, nullptr);
      !status.ok())
    return fail(verdict, "the judge: " + status.message());
  judge_attention(values, {.o = want.o, .lse = want.lse}, got, c, verdict);
}

TensorView rows_from(int64_t first, TensorView view) {
  view.data = static_cast<std::byte*>(view.data) + first * view.stride[0] * size_of(view.dtype);
  view.shape[0] -= first;
  return view;
}

/// The gradients of a row err as its probabilities do. Where shares of dS = P (d_o . v - o . d_o)
/// cancel, as those of a query always do, the row says nothing about their size: then an error of
/// P times d_o . v, which is |d_o||v| / sqrt(D), and the rounding of the two products, for each of
/// the `readers` with either sign, on a channel of size |k| / sqrt(D). Where P and dS are factors
/// in bf16, each share errs by 2^-8 of itself.
void judge_each(const Expected& e, const AttentionBackwardParams& want,
                const AttentionBackwardParams& got, const Conditions& c, Verdict* verdict) {
  const Problem& p = e.problem;
  const Batch& batch = got.batch;
  const double width = std::sqrt(double{1} * p.head_dim);
  const double scale = got.softmax_scale != 0 ? std::abs(got.softmax_scale) : 1 / width;
  const double rounding = c.rounds_probabilities ? 0x1p-8 : 2e-5;
  const double probability = rounding + 2 * logit_error(p, got, e.norms, c);
  const double d_o_v = largest_query(got.d_o, batch, p.heads_q, p.head_dim) *
                       largest_key(got.v, batch, p.block_size, p.heads_kv, p.head_dim);
  const double ds = scale * (probability * d_o_v / width + 2 * logit_error(p.head_dim, 1, d_o_v));
  const double q = largest_query(got.q, batch, p.heads_q, p.head_dim) / width;
  const double k = largest_key(got.k, batch, p.block_size, p.heads_kv, p.head_dim) / width;
  const double readers = std::sqrt(static_cast<double>(got.q.shape[0] * p.group()));
  const auto tolerance = [&](const TensorView& out, double absolute) {
    return Tolerance{.absolute = absolute + 4 * kUnit,
                     .row = probability,
                     .element = output_rounding(out.dtype)};
  };
  const auto [queries, keys, offset, block] = c.spoiled;
  compare_rows("dq", rows_from(queries, got.dq), rows_from(queries, want.dq),
               tolerance(got.dq, ds * k), verdict);
  compare_rows("dk", rows_from(keys, got.dk), rows_from(keys, want.dk),
               tolerance(got.dk, ds * q * readers), verdict);
  compare_rows("dv", rows_from(keys, got.dv), rows_from(keys, want.dv), tolerance(got.dv, 0),
               verdict);
}

double index_logit_error(const Expected& e, const Conditions& c) {
  if (c.exact_softmax) return 0;
  return logit_error(e.problem.index_dim, 1 / std::sqrt(double{1} * e.problem.index_dim), e.norms);
}

void judge_each(const Expected& e, const IndexLseParams& want, const IndexLseParams& got,
                const Conditions& c, Verdict* verdict) {
  compare_rows("lse", got.lse, want.lse, lse_tolerance(index_logit_error(e, c)), verdict);
}

/// Student and teacher err as probabilities do, so that the difference of the two errs by as much
/// of either, on a channel of an index key or query; their logarithms err as logits do. Where the
/// difference is a factor in bf16, each share errs by 2^-8 of itself: so does the row, and where
/// shares cancel one that is as large as can be, on a channel of size |k_idx| / sqrt(Di).
void judge_each(const Expected& e, const KlParams& want, const KlParams& got, const Conditions& c,
                Verdict* verdict) {
  const Problem& p = e.problem;
  const Batch& batch = got.batch;
  const double student = index_logit_error(e, c);
  const double teacher =
      logit_error(p, got,
                  largest_query(got.q, batch, p.heads_q, p.head_dim) *
                      largest_key(got.k, batch, p.block_size, p.heads_kv, p.head_dim),
                  c);
  const double probability = 4e-5 + 2 * (student + teacher);
  if (got.kl.given())
    compare_rows("kl", rows_from(c.spoiled.q_len, got.kl), rows_from(c.spoiled.q_len, want.kl),
                 {.absolute = probability, .element = probability}, verdict);
  if (!got.dq_idx.given()) return;
  const double queries = *batch.cu_seqlens_q.at<const int32_t>(batch_size(batch));
  const double factor =
      1 / std::sqrt(double{1} * p.index_dim) / std::max(1.0, queries * p.heads_kv);
  const double rounding = c.rounds_probabilities ? 0x1p-8 : 0;
  const auto tolerance = [&](const TensorView& out, double row, double shares) {
    const double channel = row / std::sqrt(double{1} * p.index_dim);
    return Tolerance{.absolute = factor * (probability * row * shares + rounding * channel),
                     .row = probability + rounding,
                     .element = output_rounding(out.dtype)};
  };
  const double q_idx = largest_query(got.q_idx, batch, p.heads_kv, p.index_dim);
  const double k_idx = largest_key(got.k_idx, batch, p.block_size, 1, p.index_dim);
  compare_rows("dq_idx", rows_from(c.spoiled.q_len, got.dq_idx),
               rows_from(c.spoiled.q_len, want.dq_idx), tolerance(got.dq_idx, k_idx, 1), verdict);
  compare_rows("dk_idx", rows_from(c.spoiled.kv_len, got.dk_idx),
               rows_from(c.spoiled.kv_len, want.dk_idx),
               tolerance(got.dk_idx, q_idx, std::sqrt(queries * p.heads_kv)), verdict);
}

}  // namespace

std::byte* make_workspace(size_t bytes, std::vector<double>* memory) {
  if (memory->size() * 8 < bytes + 64) memory->resize(bytes / 8 + 9);
  void* start = memory->data();
  size_t space = memory->size() * 8;
  return static_cast<std::byte*>(std::align(64, bytes, start, space));
}

Status expect(const Problem& problem, const Limits& limits, const Params& params, Threads* threads,
              Expected* out) {
  Expected e{.problem = problem,
             .limits = limits,
             .params = params,
             .norms = largest_product(problem, params)};
  for (const Output& output : outputs(e.params)) {
    const TensorView given = *output.view;
    const bool exact = problem.op == Op::kAppendPaged || given.dtype == DType::kI32;
    *output.view = allocate(&e, exact ? given.dtype : DType::kF32,
                            {given.shape.begin(), given.shape.begin() + given.rank});
    if (problem.op == Op::kAppendPaged) scatter(gather(given), *output.view);
  }
  MSA_TRY(std::visit(
      [&]<class P>(const P& a) {
        if constexpr (Chooses<P>) return expect_choice(a, threads, &e);
        return run_reference(problem, problem.op, limits, e.params, threads);
      },
      e.params));
  *out = std::move(e);
  return {};
}

Plan plan_on(const Backend& backend, Problem problem, const Limits& limits) {
  problem.device = {backend.device, 0};
  Plan plan;
  bind(backend, problem, limits, &plan);
  return plan;
}

Status supported_on(const Backend& backend, Problem problem, const Limits& limits) {
  problem.device = {backend.device, 0};
  return backend.supports(problem, limits);
}

bool rounds_probabilities(const Plan& plan) {
  const auto rounds = [&](const Kernel* kernel) {
    if (kernel == nullptr) return false;
    return kernel->rounds_probabilities ||
           std::any_of(kernel->steps.begin(), kernel->steps.end(), [&](Op step) {
             return rounds_probabilities(
                 plan_on(*plan.backend, step_problem(plan.problem, step), plan.limits));
           });
  };
  return plan.problem.dtype == DType::kBF16 &&
         std::any_of(plan.kernels.begin(), plan.kernels.end(), rounds);
}

int64_t alignment(const Plan& plan) {
  int64_t most = 1;
  for (const Kernel* kernel : plan.kernels)
    if (kernel != nullptr) most = std::max<int64_t>(most, kernel->alignment);
  return most;
}

Verdict judge(const Expected& expected, const Params& got, const Conditions& conditions) {
  Verdict verdict;
  std::visit(
      [&]<class P>(const P& a) {
        judge_each(expected, std::get<P>(expected.params), a, conditions, &verdict);
      },
      got);
  return verdict;
}

}  // namespace msa::conformance
