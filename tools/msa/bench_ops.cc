#include "msa/bench_ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>

#include "msa/verdict.h"

namespace msa::cli {
namespace {

constexpr int64_t kMergeParts = 4;
constexpr int64_t kSamples = 32;
constexpr int64_t kKeySamples = 4,
                  kSampledKeys = 2;  // each costs as much as two queries of all keys

template <class Params>
using Member = TensorView Params::*;

}  // namespace

std::optional<Op> op_named(std::string_view name) {
  for (int op = 0; op < kOpCount; ++op)
    if (name == name_of(static_cast<Op>(op))) return static_cast<Op>(op);
  return {};
}

// A query row as the reference recomputes it: a batch of one sequence with one token, whose
// position is given by q_offset.
struct Workload::Sample {
  Sample(int64_t sequence, int64_t position, int64_t context, const TensorView& pages)
      : cu_k{0, static_cast<int32_t>(context)},
        offset(static_cast<int32_t>(position)),
        first_key(sequence * context),
        page_table(pages.given() ? slice(pages, 0, sequence, 1) : pages) {}

  Batch batch() const {
    const auto view = [](const int32_t* data, int64_t n) {
      return TensorView::contiguous(data, DType::kI32, {n});
    };
    Batch batch{.cu_seqlens_q = view(cu_q, 2), .q_offset = view(&offset, 1)};
    if (page_table.given()) {
      batch.seq_lens = view(cu_k + 1, 1);
      batch.page_table = page_table;
    } else {
      batch.cu_seqlens_k = view(cu_k, 2);
    }
    return batch;
  }
  /// Packed keys of this sequence; pages stay whole.
  TensorView keys(const TensorView& view) const {
    return page_table.given() ? view : slice(view, 0, first_key, cu_k[1]);
  }

  int32_t cu_q[2] = {0, 1}, cu_k[2], offset;
  int64_t first_key;
  TensorView page_table;
};

// Where the tokens of an operator's arguments lie, so that any of its rows can be recomputed.
template <class Params>
struct Workload::Rows {
  std::vector<std::pair<Member<Params>, int>> tokens{};  ///< inputs and outputs, with their axis
  std::vector<Member<Params>> keys{};
  /// `params` with nothing but `count` token rows from `row` on.
  Params cut(Params params, int64_t row, int64_t count) const {
    for (const auto& [member, axis] : tokens)
      params.*member = slice(params.*member, axis, row, count);
    return params;
  }
};

Problem Workload::problem(Op op) const {
  Problem problem = setting_.problem;
  problem.op = op;
  return problem;
}

Limits Workload::limits() const {
  return {.max_batch = setting_.batch,
          .max_tokens = tokens(),
          .max_q_len = setting_.new_tokens,
          .max_kv_len = setting_.context,
          .max_threads = threads_.count()};
}

template <class Params>
Status Workload::bind(Op op, const Params& params, Operation* out) {
  Problem here = problem(op);
  if (device_ != nullptr) here.device = {DeviceKind::kCUDA, 0};
  Plan plan;
  MSA_TRY(msa::plan(here, limits(), &plan, setting_.backend));
  out->backend = plan.backend;
  if (const Kernel* kernel = kernel_of(plan, params)) out->kernel = kernel->name;
  out->cost = cost(plan.problem, setting_.new_tokens, setting_.context);
  out->cost.flops *= static_cast<double>(setting_.batch);
  out->cost.bytes *= static_cast<double>(setting_.batch);
  if (device_ != nullptr) return bind_on_device(plan, params, out);
  auto memory = std::make_shared<Array>(Array::bytes_for(plan));
  out->run = [=, threads = &threads_](int) {
    return msa::run(plan, params, memory->workspace(), {.threads = threads});
  };
  return {};
}

template <class Params>
Status Workload::bind_on_device(const Plan& plan, const Params& params, Operation* out) {
  auto memory = std::make_shared<conformance::DeviceMemory>();
  const auto bytes = static_cast<size_t>(std::max<int64_t>(1, plan.workspace_bytes));
  MSA_TRY(conformance::DeviceMemory::allocate(bytes, memory.get()));
  conformance::Params placed;
  MSA_TRY(on_device(params, 0, &placed));  // upload before anything is timed
  out->copies = copies_beyond_l2(out->cost.bytes);
  out->run = [=, this](int copy) {
    conformance::Params args;
    MSA_TRY(on_device(params, copy, &args));
    return msa::run(plan, std::get<Params>(args), Workspace{memory->data(), bytes},
                    Queue{.cuda_stream = device_->stream()});
  };
  return {};
}

/// How many copies of the data must take turns so that each is out of the cache again.
int Workload::copies_beyond_l2(double bytes_of_one_call) const {
  constexpr int kMost = 32;
  const double needed = 2.0 * static_cast<double>(device_->l2_bytes()) / bytes_of_one_call;
  int64_t all = 1;  // bytes of the data made so far
  for (const auto& [name, array] : arrays_) all += array.bytes();
  const double room = 0.6 * static_cast<double>(device_->free_bytes()) / static_cast<double>(all);
  return 1 + static_cast<int>(
                 std::clamp(std::min(std::ceil(needed), std::floor(room)), 0.0, double{kMost - 1}));
}

/// Binds an operator whose rows do not depend on each other; up to 32 of them are judged, each as a
/// batch of its own.
template <class Params>
Status Workload::bind_rows(Op op, const Params& params, const Rows<Params>& rows, Operation* out) {
  MSA_TRY(bind(op, params, out));
  out->verify = [=, this, backend = out->backend](Verdict* worst) -> Status {
    MSA_TRY(fetch(params));
    const int64_t count = std::min(kSamples, tokens());
    const TensorView pages = batch().page_table;
    std::mutex mutex;
    Status failed;
    threads_.parallel_for(count, [&](int64_t task, int) {
      // The first and the last row, and others between them at odd places; the longest begin.
      const int64_t i = count - 1 - task;
      int64_t row = count > 1 ? i * (tokens() - 1) / (count - 1) : 0;
      if (i > 0 && i + 1 < count) row = std::min(tokens() - 1, row + i * 37 % 61);
      const Sample sample(row / setting_.new_tokens, position(row), setting_.context, pages);
      Params one = rows.cut(params, row, 1);
      for (const auto& member : rows.keys) one.*member = sample.keys(params.*member);
      if constexpr (requires { one.batch; }) one.batch = sample.batch();
      Verdict verdict;
      const Limits one_token{.max_kv_len = setting_.context, .max_threads = 1};
      const Status status = add_verdict(problem(op), one_token, *backend, one, nullptr, &verdict);
      if (!verdict.ok()) verdict.failure = fmt::format("query row {}: {}", row, verdict.failure);
      const std::scoped_lock lock(mutex);
      if (failed.ok()) failed = status;
      merge(verdict, worst);
    });
    return failed;
  };
  return {};
}

/// Binds an operator that is cheap enough to be judged as a whole.
template <class Params>
Status Workload::bind_whole(Op op, const Params& params, Operation* out) {
  MSA_TRY(bind(op, params, out));
  out->verify = [=, this, backend = out->backend](Verdict* verdict) -> Status {
    MSA_TRY(fetch(params));
    return add_verdict(problem(op), limits(), *backend, params, &threads_, verdict);
  };
  return {};
}

Status Workload::bind_select(const TensorView& selected, Operation* out) {
  using P = IndexSelectParams;
  return bind_rows(Op::kIndexSelect,
                   P{.q_idx = q_idx(), .k_idx = index_keys(), .batch = batch(), .ids = selected},
                   Rows<P>{.tokens = {{&P::q_idx, 0}, {&P::ids, 1}}, .keys = {&P::k_idx}}, out);
}

Status Workload::bind_sparse(Op op, const TensorView& lists, Operation* out) {
  using P = SparseAttentionParams;
  return bind_rows(op,
                   P{.q = q(),
                     .k = keys("k"),
                     .v = keys("v"),
                     .ids = lists,
                     .batch = batch(),
                     .o = o(),
                     .lse = lse()},
                   Rows<P>{.tokens = {{&P::q, 0}, {&P::ids, 1}, {&P::o, 0}, {&P::lse, 0}},
                           .keys = {&P::k, &P::v}},
                   out);
}

Status Workload::bind_dense(Operation* out) {
  using P = DenseAttentionParams;
  return bind_rows(
      Op::kDenseAttention,
      P{.q = q(), .k = keys("k"), .v = keys("v"), .batch = batch(), .o = o(), .lse = lse()},
      Rows<P>{.tokens = {{&P::q, 0}, {&P::o, 0}, {&P::lse, 0}}, .keys = {&P::k, &P::v}}, out);
}

/// Index selection, then attention, as one call: a decoding step over its own selection is one of
/// the library as well. With given lists (a trace, random ids) the attention reads those instead of
/// what was just selected.
Status Workload::bind_msa(Operation* out) {
  if (setting_.decode() && setting_.selection == "index" &&
      setting_.problem.layout == KvLayout::kPaged)
    return bind_layer(out);
  Operation select, attend;
  const TensorView selected = output("selected", DType::kI32, {hkv(), tokens(), topk()});
  TensorView lists = selected;
  if (setting_.selection != "index") MSA_TRY(ids(&lists));
  MSA_TRY(bind_select(selected, &select));
  MSA_TRY(
      bind_sparse(setting_.decode() ? Op::kSparseDecode : Op::kSparseAttention, lists, &attend));
  *out = attend;
  out->kernel = select.kernel + ", " + attend.kernel;
  out->cost.flops += select.cost.flops;
  out->cost.bytes += select.cost.bytes;
  out->copies = std::min(select.copies, attend.copies);
  out->run = [first = select.run, then = attend.run](int copy) {
    MSA_TRY(first(copy));
    return then(copy);
  };
  out->verify = [first = select.verify, then = attend.verify](Verdict* verdict) {
    MSA_TRY(first(verdict));
    return then(verdict);
  };
  return {};
}

Status Workload::bind_layer(Operation* out) {
  using P = LayerDecodeParams;
  return bind_rows(
      Op::kLayerDecode,
      P{.q = q(),
        .q_idx = q_idx(),
        .k = keys("k"),
        .v = keys("v"),
        .k_idx = index_keys(),
        .batch = batch(),
        .o = o(),
        .lse = lse(),
        .ids = output("selected", DType::kI32, {hkv(), tokens(), topk()})},
      Rows<P>{.tokens = {{&P::q, 0}, {&P::q_idx, 0}, {&P::o, 0}, {&P::lse, 0}, {&P::ids, 1}},
              .keys = {&P::k, &P::v, &P::k_idx}},
      out);
}

Status Workload::bind_block_mass(Operation* out) {
  Operation dense;  // its lse is an input
  MSA_TRY(bind_dense(&dense));
  MSA_TRY(dense.run(0));
  MSA_TRY(fetch(DenseAttentionParams{.lse = lse()}));
  const TensorView given = input("dense lse", {tokens(), setting_.problem.heads_q}, DType::kF32);
  std::copy_n(lse().at<const float>(), given.numel(), given.at<float>());
  using P = BlockMassParams;
  return bind_rows(Op::kBlockMass,
                   P{.q = q(),
                     .k = keys("k"),
                     .lse = given,
                     .batch = batch(),
                     .mass = output("mass", DType::kF32, {hkv(), tokens(), blocks()})},
                   Rows<P>{.tokens = {{&P::q, 0}, {&P::lse, 0}, {&P::mass, 1}}, .keys = {&P::k}},
                   out);
}

// ---- training ----

/// Gradients are sums over the whole batch: a query sees all of its keys, but is one of many that
/// reach them. So samples of queries judge one kind of output, samples of keys the other.
template <class Params>
struct Workload::GradientsOf {
  std::vector<Member<Params>> queries{}, keys{};
};

namespace {

/// Judges a part of a call but for the outputs in `others`. The gradients of a mean over queries
/// are `weight` times as large as if the part's were all.
template <class Params>
Status judge_part(const Problem& problem, const Limits& limits, const Backend& backend, Params part,
                  const std::vector<Member<Params>>& judged,
                  const std::vector<Member<Params>>& others, float weight, Verdict* worst) {
  std::vector<std::vector<float>> weighted;
  for (const auto& member : judged) {
    if (weight == 1) break;
    TensorView& view = part.*member;
    std::vector<float>& values = weighted.emplace_back(static_cast<size_t>(view.numel()));
    for (int64_t i = 0; i < view.numel(); ++i)
      values[static_cast<size_t>(i)] =
          weight * view.at<float>()[conformance::element_offset(view, i)];
    view = view.rank == 2
               ? TensorView::contiguous(values.data(), DType::kF32, {view.shape[0], view.shape[1]})
               : TensorView::contiguous(values.data(), DType::kF32,
                                        {view.shape[0], view.shape[1], view.shape[2]});
  }
  conformance::Expected expected;
  MSA_TRY(conformance::expect(problem, limits, part, nullptr, &expected));
  for (const auto& member : others) part.*member = std::get<Params>(expected.params).*member;
  const bool rounds =
      conformance::rounds_probabilities(conformance::plan_on(backend, problem, limits));
  merge(conformance::judge(expected, part, {.rounds_probabilities = rounds}), worst);
  return {};
}

}  // namespace

template <class Params>
Status Workload::bind_gradients(Op op, const Params& params, const Rows<Params>& rows,
                                const GradientsOf<Params>& gradients, Operation* out) {
  MSA_TRY(bind(op, params, out));
  out->verify = [=, this, backend = out->backend](Verdict* worst) -> Status {
    MSA_TRY(fetch(params));
    const int64_t queries = std::min(kSamples, tokens());
    const int64_t keys = gradients.keys.empty() ? 0 : std::min(kKeySamples, blocks());
    const auto weight = [&](int64_t count) {  // float32 outputs only
      return op == Op::kKlBackward ? static_cast<float>(tokens()) / static_cast<float>(count)
                                   : 1.0f;
    };
    std::mutex mutex;
    Status failed;
    threads_.parallel_for(queries + keys, [&](int64_t i, int) {
      Verdict verdict;
      Status status;
      std::string what;
      if (i < queries) {  // one query, all of its keys
        const int64_t row = queries > 1 ? i * (tokens() - 1) / (queries - 1) : 0;
        const Sample sample(row / setting_.new_tokens, position(row), setting_.context, {});
        Params part = rows.cut(params, row, 1);
        for (const auto& member : rows.keys) part.*member = sample.keys(params.*member);
        part.batch = sample.batch();
        const Limits limits{.max_kv_len = setting_.context, .max_threads = 1};
        status = judge_part(problem(op), limits, *backend, part, gradients.queries, gradients.keys,
                            weight(1), &verdict);
        what = fmt::format("query row {}", row);
      } else {  // the first keys of a block, all queries of the sequence
        const int64_t sequence = (i - queries) % setting_.batch;
        const int64_t block = keys > 1 ? (i - queries) * (blocks() - 1) / (keys - 1) : 0;
        const int64_t first = block * setting_.problem.block_size;
        const int32_t cu_q[] = {0, static_cast<int32_t>(setting_.new_tokens)};
        const int32_t cu_k[] = {
            0, static_cast<int32_t>(std::min(kSampledKeys, setting_.context - first))};
        const auto q_offset = static_cast<int32_t>(setting_.context - setting_.new_tokens);
        const auto block_offset = static_cast<int32_t>(block);
        const auto view = [](const int32_t* data, int64_t n) {
          return TensorView::contiguous(data, DType::kI32, {n});
        };
        Params part = rows.cut(params, sequence * setting_.new_tokens, setting_.new_tokens);
        for (const auto& member : rows.keys)
          part.*member = slice(params.*member, 0, sequence * setting_.context + first, cu_k[1]);
        part.batch = {.cu_seqlens_q = view(cu_q, 2),
                      .cu_seqlens_k = view(cu_k, 2),
                      .q_offset = view(&q_offset, 1),
                      .block_offset = view(&block_offset, 1)};
        const Limits limits{.max_tokens = setting_.new_tokens,
                            .max_q_len = setting_.new_tokens,
                            .max_kv_len = kSampledKeys,
                            .max_threads = 1};
        status = judge_part(problem(op), limits, *backend, part, gradients.keys, gradients.queries,
                            weight(setting_.new_tokens), &verdict);
        what = fmt::format("key {} of sequence {}", first, sequence);
      }
      if (!verdict.ok()) verdict.failure = fmt::format("{}: {}", what, verdict.failure);
      const std::scoped_lock lock(mutex);
      if (failed.ok()) failed = status;
      merge(verdict, worst);
    });
    return failed;
  };
  return {};
}

/// Runs an operation once and keeps one of its outputs as an input of others.
Status Workload::result_of(const Operation& operation, const conformance::Params& made,
                           const std::string& name, const TensorView& result, TensorView* out) {
  MSA_TRY(operation.run(0));
  MSA_TRY(fetch(made));
  *out = input(name, {result.shape.begin(), result.shape.begin() + result.rank}, result.dtype);
  conformance::scatter(conformance::gather(result), *out);
  return {};
}

Status Workload::bind_attention_backward(Op op, Operation* out) {
  using P = AttentionBackwardParams;
  const Problem& p = setting_.problem;
  const bool sparse = op == Op::kSparseAttentionBackward;
  const std::string name = sparse ? "sparse" : "dense";
  P params{.q = q(), .k = keys("k"), .v = keys("v"), .batch = batch()};
  Operation forward;
  if (sparse) MSA_TRY(ids(&params.ids));
  MSA_TRY(sparse ? bind_sparse(Op::kSparseAttention, params.ids, &forward) : bind_dense(&forward));
  const SparseAttentionParams made{.o = o(), .lse = lse()};
  MSA_TRY(result_of(forward, made, name + " o", o(), &params.o));
  MSA_TRY(result_of(forward, made, name + " lse", lse(), &params.lse));
  params.d_o = input("d_o", {tokens(), p.heads_q, p.head_dim}, p.dtype);
  const int64_t all_keys = setting_.batch * setting_.context;
  params.dq = output("dq", p.dtype, {tokens(), p.heads_q, p.head_dim});
  params.dk = output("dk", p.dtype, {all_keys, p.heads_kv, p.head_dim});
  params.dv = output("dv", p.dtype, {all_keys, p.heads_kv, p.head_dim});
  Rows<P> rows{.tokens = {{&P::q, 0}, {&P::o, 0}, {&P::lse, 0}, {&P::d_o, 0}, {&P::dq, 0}},
               .keys = {&P::k, &P::v, &P::dk, &P::dv}};
  if (sparse) rows.tokens.emplace_back(&P::ids, 1);
  return bind_gradients(op, params, rows, {.queries = {&P::dq}, .keys = {&P::dk, &P::dv}}, out);
}

Status Workload::bind_index_lse(const TensorView& lists, Operation* out) {
  using P = IndexLseParams;
  return bind_rows(
      Op::kIndexLse,
      P{.q_idx = q_idx(),
        .k_idx = index_keys(),
        .ids = lists,
        .batch = batch(),
        .lse = output("index lse", DType::kF32, {tokens(), hkv()})},
      Rows<P>{.tokens = {{&P::q_idx, 0}, {&P::ids, 1}, {&P::lse, 0}}, .keys = {&P::k_idx}}, out);
}

Status Workload::bind_kl(Op op, Operation* out) {
  using P = KlParams;
  const Problem& p = setting_.problem;
  P params{.q = q(), .k = keys("k"), .q_idx = q_idx(), .k_idx = index_keys(), .batch = batch()};
  Operation forward, index;
  MSA_TRY(ids(&params.ids));
  MSA_TRY(bind_sparse(Op::kSparseAttention, params.ids, &forward));
  MSA_TRY(bind_index_lse(params.ids, &index));
  const TensorView made = output("index lse", DType::kF32, {tokens(), hkv()});
  MSA_TRY(result_of(forward, SparseAttentionParams{.o = o(), .lse = lse()}, "sparse lse", lse(),
                    &params.lse));
  MSA_TRY(result_of(index, IndexLseParams{.lse = made}, "index lse", made, &params.index_lse));
  Rows<P> rows{
      .tokens = {{&P::q, 0}, {&P::lse, 0}, {&P::q_idx, 0}, {&P::index_lse, 0}, {&P::ids, 1}},
      .keys = {&P::k, &P::k_idx}};
  if (op == Op::kKlLoss) {
    params.kl = output("kl", DType::kF32, {tokens(), hkv()});
    rows.tokens.emplace_back(&P::kl, 0);
    return bind_rows(op, params, rows, out);
  }
  params.dq_idx = output("dq_idx", DType::kF32, {tokens(), hkv(), p.index_dim});
  params.dk_idx = output("dk_idx", DType::kF32, {setting_.batch * setting_.context, p.index_dim});
  rows.tokens.emplace_back(&P::dq_idx, 0);
  rows.keys.push_back(&P::dk_idx);
  return bind_gradients(op, params, rows, {.queries = {&P::dq_idx}, .keys = {&P::dk_idx}}, out);
}

Status Workload::bind(Op op, Operation* out) {
  const Problem& p = setting_.problem;
  TensorView lists;
  switch (op) {
    case Op::kDenseAttention:
      return bind_dense(out);
    case Op::kSparseAttention:
    case Op::kSparseDecode:
      MSA_TRY(ids(&lists));
      return bind_sparse(op, lists, out);
    case Op::kIndexSelect:
      return bind_select(output("selected", DType::kI32, {hkv(), tokens(), topk()}), out);
    case Op::kIndexScores: {
      using P = IndexScoresParams;
      return bind_rows(op,
                       P{.q_idx = q_idx(),
                         .k_idx = index_keys(),
                         .batch = batch(),
                         .scores = output("scores", DType::kF32, {hkv(), tokens(), blocks()})},
                       Rows<P>{.tokens = {{&P::q_idx, 0}, {&P::scores, 1}}, .keys = {&P::k_idx}},
                       out);
    }
    case Op::kSelectBlocks: {
      using P = SelectBlocksParams;
      return bind_rows(
          op,
          P{.scores = input("scores", {hkv(), tokens(), blocks()}, DType::kF32),
            .num_valid_blocks = visible_blocks(),
            .ids = output("selected", DType::kI32, {hkv(), tokens(), topk()})},
          Rows<P>{.tokens = {{&P::scores, 1}, {&P::num_valid_blocks, 0}, {&P::ids, 1}}}, out);
    }
    case Op::kMerge: {
      using P = MergeParams;
      return bind_rows(
          op,
          P{.o_parts = input("o_parts", {kMergeParts, tokens(), p.heads_q, p.head_dim}, p.dtype),
            .lse_parts = input("lse_parts", {kMergeParts, tokens(), p.heads_q}, DType::kF32),
            .o = o(),
            .lse = lse()},
          Rows<P>{.tokens = {{&P::o_parts, 1}, {&P::lse_parts, 1}, {&P::o, 0}, {&P::lse, 0}}}, out);
    }
    case Op::kBlockLists: {
      using P = BlockListsParams;
      MSA_TRY(ids(&lists));
      return bind_whole(
          op,
          P{.ids = lists,
            .batch = batch(),
            .row_ptr = output("row_ptr", DType::kI32, {hkv(), setting_.batch * blocks() + 1}),
            .entries = output("entries", DType::kI32, {hkv(), tokens() * topk()})},
          out);
    }
    case Op::kAppendPaged: {
      using P = AppendPagedParams;
      const int64_t pages = setting_.batch * blocks();
      const auto cache = [&](const char* name) {
        return output(name, p.dtype, {pages, p.heads_kv, p.block_size, p.head_dim});
      };
      return bind_whole(
          op,
          P{.k = input("new k", {tokens(), p.heads_kv, p.head_dim}, p.dtype),
            .v = input("new v", {tokens(), p.heads_kv, p.head_dim}, p.dtype),
            .k_idx = input("new k_idx", {tokens(), p.index_dim}, p.dtype),
            .batch = batch(),
            .k_pages = cache("k_pages"),
            .v_pages = cache("v_pages"),
            .k_idx_pages = output("k_idx_pages", p.dtype, {pages, p.block_size, p.index_dim})},
          out);
    }
    case Op::kBlockMass:
      return bind_block_mass(out);
    case Op::kLayerDecode:
      return bind_layer(out);
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
      return bind_attention_backward(op, out);
    case Op::kIndexLse:
      MSA_TRY(ids(&lists));
      return bind_index_lse(lists, out);
    case Op::kKlBackward:
    case Op::kKlLoss:
      return bind_kl(op, out);
  }
  return Status(StatusCode::kInternal, "an operator without a benchmark");
}

Status Workload::add(const std::string& name, Operation* out) {
  if (name == "msa") {
    MSA_TRY(bind_msa(out));
  } else {
    const std::optional<Op> op = op_named(name);
    if (!op) return Status(StatusCode::kInvalidArgument, "--op: got " + name);
    MSA_TRY(bind(*op, out));
  }
  out->op = name;
  return {};
}

}  // namespace msa::cli
