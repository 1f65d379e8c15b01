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

template <class Params>
using Member = TensorView Params::*;

}  // namespace

std::vector<std::string> bench_op_names() {
  std::vector<std::string> names = {"msa"};
  for (int op = 0; op < kOpCount; ++op) names.push_back(name_of(static_cast<Op>(op)));
  return names;
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
    threads_.parallel_for(count, [&](int64_t i, int) {
      // The first and the last row, and others between them at odd places.
      int64_t row = count > 1 ? i * (tokens() - 1) / (count - 1) : 0;
      if (i > 0 && i + 1 < count) row = std::min(tokens() - 1, row + i * 37 % 61);
      const Sample sample(row / setting_.new_tokens, position(row), setting_.context, pages);
      Params one = params;
      for (const auto& [member, axis] : rows.tokens)
        one.*member = slice(params.*member, axis, row, 1);
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
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
    case Op::kIndexLse:
    case Op::kKlBackward:
    case Op::kKlLoss:
      break;
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
