#include "msa/bench_ops.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

#include "msa/compare.h"

namespace msa::cli {
namespace {

constexpr int64_t kMergeParts = 4;
constexpr int64_t kSamples = 32;

/// The call of one operator; it keeps its plan and workspace alive.
template <class Params>
Status make_call(const Problem& problem, const Limits& limits, const std::string& backend,
                 const Params& params, Queue queue, std::function<Status()>* call,
                 const Backend** chosen = nullptr) {
  Plan plan;
  MSA_TRY(msa::plan(problem, limits, &plan, backend));
  if (chosen != nullptr) *chosen = plan.backend;
  auto memory = std::make_shared<Array>(Array::bytes_for(plan));
  *call = [=] { return msa::run(plan, params, memory->workspace(), queue); };
  return {};
}

template <class Params>
using Member = TensorView Params::*;

}  // namespace

std::vector<std::string> bench_op_names() {
  std::vector<std::string> names = {"msa"};
  for (int op = 0; op < kOpCount; ++op) names.push_back(name_of(static_cast<Op>(op)));
  return names;
}

// What the reference recomputes: one query row, as a batch of one sequence with one token whose
// position is given by q_offset.
struct Workload::Sample {
  int64_t row = 0, sequence = 0, position = 0;
  int32_t cu_q[2] = {0, 1}, cu_k[2] = {0, 0}, length = 0, offset = 0;
  TensorView page_table{};

  Batch batch() const {
    const auto view = [](const int32_t* data, int64_t n) {
      return TensorView::contiguous(data, DType::kI32, {n});
    };
    Batch batch{.cu_seqlens_q = view(cu_q, 2), .q_offset = view(&offset, 1)};
    if (page_table.given()) {
      batch.seq_lens = view(&length, 1);
      batch.page_table = page_table;
    } else {
      batch.cu_seqlens_k = view(cu_k, 2);
    }
    return batch;
  }
  /// Packed keys of this sequence; pages stay whole.
  TensorView keys(const TensorView& view) const {
    return page_table.given() ? view : slice(view, 0, sequence * length, length);
  }
};

// Where the tokens of an operator's arguments lie, so that any of its rows can be recomputed.
template <class Params>
struct Workload::Rows {
  std::vector<std::pair<Member<Params>, int>> inputs{};  ///< with the axis of the tokens
  std::vector<Member<Params>> keys{};
  std::vector<std::pair<Member<Params>, int>> outputs{};
};

template <class Params>
Status Workload::bind(Op op, const Params& params, Operation* out) {
  Problem problem = setting_.problem;
  problem.op = op;
  const Limits limits{.max_batch = setting_.batch,
                      .max_tokens = tokens(),
                      .max_q_len = setting_.new_tokens,
                      .max_kv_len = setting_.context,
                      .max_threads = threads_.count()};
  const Backend* backend = nullptr;
  MSA_TRY(make_call(problem, limits, setting_.backend, params, Queue{.threads = &threads_},
                    &out->run, &backend));
  out->backend = backend->name();
  out->cost = cost(problem, setting_.new_tokens, setting_.context);
  out->cost.flops *= static_cast<double>(setting_.batch);
  out->cost.bytes *= static_cast<double>(setting_.batch);
  return {};
}

template <class Params>
Status Workload::run_reference(Op op, const Params& params, const Limits& limits) const {
  Problem problem = setting_.problem;
  problem.op = op;
  std::function<Status()> call;
  MSA_TRY(make_call(problem, limits, "reference", params, Queue{}, &call));
  return call();
}

/// Calls `check` for up to 32 query rows of all sequences, in parallel.
Status Workload::each_sample(const std::function<Status(const Sample&, Verdict*)>& check,
                             Verdict* out) {
  const int64_t count = std::min(kSamples, tokens());
  const TensorView pages = batch().page_table;
  std::mutex mutex;
  Status status;
  threads_.parallel_for(count, [&](int64_t i, int) {
    Sample sample;
    // The first and the last row, and others between them at odd places.
    sample.row = count > 1 ? i * (tokens() - 1) / (count - 1) : 0;
    if (i > 0 && i + 1 < count) sample.row = std::min(tokens() - 1, sample.row + i * 37 % 61);
    sample.sequence = sample.row / setting_.new_tokens;
    sample.position = position(sample.row);
    sample.offset = static_cast<int32_t>(sample.position);
    sample.length = sample.cu_k[1] = static_cast<int32_t>(setting_.context);
    if (pages.given()) sample.page_table = slice(pages, 0, sample.sequence, 1);
    Verdict verdict;
    const Status checked = check(sample, &verdict);
    const std::scoped_lock lock(mutex);
    if (status.ok()) status = checked;
    out->merge(verdict);
  });
  return status;
}

/// Binds an operator whose rows do not depend on each other.
template <class Params>
Status Workload::bind_rows(Op op, const Params& params, const Rows<Params>& rows, Operation* out) {
  out->verify = [=, this](Verdict* verdict) {
    return each_sample(
        [&](const Sample& sample, Verdict* found) {
          Params one = params;
          std::vector<Array> expected;
          for (const auto& [member, axis] : rows.inputs)
            one.*member = slice(params.*member, axis, sample.row, 1);
          for (const auto& [member, axis] : rows.outputs) {
            const TensorView row = slice(params.*member, axis, sample.row, 1);
            expected.emplace_back(row.dtype == DType::kI32 ? DType::kI32 : DType::kF32,
                                  std::span(row.shape.data(), static_cast<size_t>(row.rank)));
            one.*member = expected.back().view();
          }
          for (const auto& member : rows.keys) one.*member = sample.keys(params.*member);
          if constexpr (requires { one.batch; }) one.batch = sample.batch();
          MSA_TRY(run_reference(op, one, {.max_kv_len = sample.length, .max_threads = 1}));
          for (const auto& [member, axis] : rows.outputs)
            compare(slice(params.*member, axis, sample.row, 1), one.*member, setting_.problem.dtype,
                    found);
          return Status();
        },
        verdict);
  };
  return bind(op, params, out);
}

/// Binds an operator that moves data: every byte of its outputs must be the reference's.
template <class Params>
Status Workload::bind_exact(Op op, const Params& params, const std::vector<Member<Params>>& outputs,
                            Operation* out) {
  out->verify = [=, this](Verdict* verdict) {
    Params whole = params;
    std::vector<Array> expected;
    for (const auto& member : outputs) {
      const TensorView& view = params.*member;
      expected.emplace_back(view.dtype,
                            std::span(view.shape.data(), static_cast<size_t>(view.rank)));
      whole.*member = expected.back().view();
      poison(whole.*member);
    }
    MSA_TRY(run_reference(op, whole,
                          {.max_batch = setting_.batch,
                           .max_tokens = tokens(),
                           .max_q_len = setting_.new_tokens,
                           .max_kv_len = setting_.context,
                           .max_threads = 1}));
    for (const auto& member : outputs) compare_bytes(params.*member, whole.*member, verdict);
    return Status();
  };
  return bind(op, params, out);
}

/// Index selection is judged by the reference's block scores: lists may differ in near ties.
Status Workload::bind_select(const TensorView& ids, Operation* out) {
  const IndexSelectParams params{
      .q_idx = q_idx(), .k_idx = index_keys(), .batch = batch(), .ids = ids};
  out->verify = [=, this](Verdict* verdict) {
    return each_sample(
        [&](const Sample& sample, Verdict* found) {
          const Array scores(DType::kF32, {hkv(), 1, blocks()});
          MSA_TRY(run_reference(Op::kIndexScores,
                                IndexScoresParams{.q_idx = slice(params.q_idx, 0, sample.row, 1),
                                                  .k_idx = sample.keys(params.k_idx),
                                                  .batch = sample.batch(),
                                                  .scores = scores.view()},
                                {.max_kv_len = sample.length, .max_threads = 1}));
          for (int64_t head = 0; head < hkv(); ++head)
            compare_list(
                std::span(ids.at<const int32_t>(head, sample.row), static_cast<size_t>(topk())),
                std::span(scores.view().at<const float>(head),
                          static_cast<size_t>(visible(sample.position))),
                setting_.problem, found);
          return Status();
        },
        verdict);
  };
  return bind(Op::kIndexSelect, params, out);
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
                   Rows<P>{.inputs = {{&P::q, 0}, {&P::ids, 1}},
                           .keys = {&P::k, &P::v},
                           .outputs = {{&P::o, 0}, {&P::lse, 0}}},
                   out);
}

Status Workload::bind_dense(Operation* out) {
  using P = DenseAttentionParams;
  return bind_rows(
      Op::kDenseAttention,
      P{.q = q(), .k = keys("k"), .v = keys("v"), .batch = batch(), .o = o(), .lse = lse()},
      Rows<P>{
          .inputs = {{&P::q, 0}}, .keys = {&P::k, &P::v}, .outputs = {{&P::o, 0}, {&P::lse, 0}}},
      out);
}

/// Index selection, then attention, as one call. With given lists (a trace, random ids) the
/// attention reads those instead of what was just selected.
Status Workload::bind_msa(Operation* out) {
  Operation select, attend;
  const TensorView selected = output("selected", DType::kI32, {hkv(), tokens(), topk()});
  TensorView lists = selected;
  if (setting_.selection != "index") MSA_TRY(ids(&lists));
  MSA_TRY(bind_select(selected, &select));
  MSA_TRY(
      bind_sparse(setting_.decode() ? Op::kSparseDecode : Op::kSparseAttention, lists, &attend));
  *out = attend;
  out->cost.flops += select.cost.flops;
  out->cost.bytes += select.cost.bytes;
  out->run = [first = select.run, then = attend.run] {
    MSA_TRY(first());
    return then();
  };
  out->verify = [first = select.verify, then = attend.verify](Verdict* verdict) {
    MSA_TRY(first(verdict));
    return then(verdict);
  };
  return {};
}

Status Workload::bind_block_mass(Operation* out) {
  Operation dense;  // its lse is an input
  MSA_TRY(bind_dense(&dense));
  MSA_TRY(dense.run());
  const TensorView given = input("dense lse", {tokens(), setting_.problem.heads_q}, DType::kF32);
  std::copy_n(lse().at<const float>(), given.numel(), given.at<float>());
  using P = BlockMassParams;
  return bind_rows(
      Op::kBlockMass,
      P{.q = q(),
        .k = keys("k"),
        .lse = given,
        .batch = batch(),
        .mass = output("mass", DType::kF32, {hkv(), tokens(), blocks()})},
      Rows<P>{.inputs = {{&P::q, 0}, {&P::lse, 0}}, .keys = {&P::k}, .outputs = {{&P::mass, 1}}},
      out);
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
      return bind_rows(
          op,
          P{.q_idx = q_idx(),
            .k_idx = index_keys(),
            .batch = batch(),
            .scores = output("scores", DType::kF32, {hkv(), tokens(), blocks()})},
          Rows<P>{.inputs = {{&P::q_idx, 0}}, .keys = {&P::k_idx}, .outputs = {{&P::scores, 1}}},
          out);
    }
    case Op::kSelectBlocks: {
      using P = SelectBlocksParams;
      return bind_rows(op,
                       P{.scores = input("scores", {hkv(), tokens(), blocks()}, DType::kF32),
                         .num_valid_blocks = visible_blocks(),
                         .ids = output("selected", DType::kI32, {hkv(), tokens(), topk()})},
                       Rows<P>{.inputs = {{&P::scores, 1}, {&P::num_valid_blocks, 0}},
                               .outputs = {{&P::ids, 1}}},
                       out);
    }
    case Op::kMerge: {
      using P = MergeParams;
      return bind_rows(
          op,
          P{.o_parts = input("o_parts", {kMergeParts, tokens(), p.heads_q, p.head_dim}, p.dtype),
            .lse_parts = input("lse_parts", {kMergeParts, tokens(), p.heads_q}, DType::kF32),
            .o = o(),
            .lse = lse()},
          Rows<P>{.inputs = {{&P::o_parts, 1}, {&P::lse_parts, 1}},
                  .outputs = {{&P::o, 0}, {&P::lse, 0}}},
          out);
    }
    case Op::kBlockLists: {
      using P = BlockListsParams;
      MSA_TRY(ids(&lists));
      return bind_exact(
          op,
          P{.ids = lists,
            .batch = batch(),
            .row_ptr = output("row_ptr", DType::kI32, {hkv(), setting_.batch * blocks() + 1}),
            .entries = output("entries", DType::kI32, {hkv(), tokens() * topk()})},
          {&P::row_ptr, &P::entries}, out);
    }
    case Op::kAppendPaged: {
      using P = AppendPagedParams;
      const int64_t pages = setting_.batch * blocks();
      const auto cache = [&](const char* name) {
        return output(name, p.dtype, {pages, p.heads_kv, p.block_size, p.head_dim});
      };
      return bind_exact(
          op,
          P{.k = input("new k", {tokens(), p.heads_kv, p.head_dim}, p.dtype),
            .v = input("new v", {tokens(), p.heads_kv, p.head_dim}, p.dtype),
            .k_idx = input("new k_idx", {tokens(), p.index_dim}, p.dtype),
            .batch = batch(),
            .k_pages = cache("k_pages"),
            .v_pages = cache("v_pages"),
            .k_idx_pages = output("k_idx_pages", p.dtype, {pages, p.block_size, p.index_dim})},
          {&P::k_pages, &P::v_pages, &P::k_idx_pages}, out);
    }
    case Op::kBlockMass:
      return bind_block_mass(out);
  }
  return Status(StatusCode::kInternal, "an operator without a benchmark");
}

Status Workload::add(const std::string& name, Operation* out) {
  if (name == "msa") {
    MSA_TRY(bind_msa(out));
  } else {
    int op = 0;
    while (op < kOpCount && name != name_of(static_cast<Op>(op))) ++op;
    MSA_TRY(bind(static_cast<Op>(op), out));
  }
  out->op = name;
  return {};
}

}  // namespace msa::cli
