#include "msa/bench_ops.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <utility>

#include "core/registry.h"
#include "msa/verdict.h"

namespace msa::cli {
namespace {

using conformance::data_of;
using conformance::Params;
using conformance::params_ref;

constexpr int64_t kParts = 4;
constexpr int64_t kSamples = 32;
constexpr int64_t kKeySamples = 4,
                  kSampledKeys = 2;  // each costs as much as two queries of all keys

/// Inputs that are results of other operators.
struct Made {
  Op op;
  std::string_view argument;
  Op by;
  std::string_view output;
};
constexpr Made kMade[] = {{Op::kBlockMass, "lse", Op::kDenseAttention, "lse"},
                          {Op::kSparseAttentionBackward, "o", Op::kSparseAttention, "o"},
                          {Op::kSparseAttentionBackward, "lse", Op::kSparseAttention, "lse"},
                          {Op::kDenseAttentionBackward, "o", Op::kDenseAttention, "o"},
                          {Op::kDenseAttentionBackward, "lse", Op::kDenseAttention, "lse"},
                          {Op::kKlBackward, "lse", Op::kSparseAttention, "lse"},
                          {Op::kKlBackward, "index_lse", Op::kIndexLse, "lse"},
                          {Op::kKlLoss, "lse", Op::kSparseAttention, "lse"},
                          {Op::kKlLoss, "index_lse", Op::kIndexLse, "lse"}};

/// The axis of a letter in the shape of an argument; -1: it has none.
int axis_of(const Argument& a, bool paged, std::string_view letter) {
  int axis = -1, i = 0;
  for_each_letter(a.letters(paged), [&](std::string_view l) {
    if (l == letter) axis = i;
    ++i;
  });
  return axis;
}

/// `params` with nothing but `count` tokens from `first` on: rows of T for "T", of keys for "S".
Params cut(Params params, bool paged, std::string_view letter, int64_t first, int64_t count) {
  for (const Argument& a : info_of(params_ref(params).op()).arguments) {
    if (!a.is_tensor() || !a.in(data_of(params)).given()) continue;
    TensorView& view = a.in(data_of(params));
    if (const int axis = axis_of(a, paged, letter); axis >= 0)
      view = slice(view, axis, first, count);
  }
  return params;
}

// A query row as the reference recomputes it: a batch of one sequence with one token, whose
// position is given by q_offset.
struct Sample {
  Sample(int64_t position, int64_t context, const TensorView& pages)
      : cu_k{0, static_cast<int32_t>(context)},
        offset(static_cast<int32_t>(position)),
        page_table(pages) {}

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

  int32_t cu_q[2] = {0, 1}, cu_k[2], offset;
  TensorView page_table;
};

/// Judges a part of a call by those of its outputs that have the letter. The gradients of a mean
/// over queries are `weight` times as large as if the part's were all.
Status judge_part(const Problem& problem, const Limits& limits, const Backend& backend, Params part,
                  std::string_view letter, float weight, Verdict* worst) {
  conformance::Expected expected;
  MSA_TRY(conformance::expect(problem, limits, part, nullptr, &expected));
  std::vector<std::vector<float>> weighted;
  for (const Argument& a : info_of(problem.op).arguments) {
    if (!a.is_tensor() || !a.is_written() || !a.in(data_of(part)).given()) continue;
    TensorView& view = a.in(data_of(part));
    if (axis_of(a, false, letter) < 0) {
      view = a.in(data_of(expected.params));
    } else if (weight != 1) {
      std::vector<float>& values = weighted.emplace_back(static_cast<size_t>(view.numel()));
      for (int64_t i = 0; i < view.numel(); ++i)
        values[static_cast<size_t>(i)] =
            weight * view.at<float>()[conformance::element_offset(view, i)];
      view.data = values.data();
      for (int64_t step = 1, i = view.rank; i-- > 0; step *= view.shape[static_cast<size_t>(i)])
        view.stride[static_cast<size_t>(i)] = step;
    }
  }
  const bool rounds =
      conformance::rounds_probabilities(conformance::plan_on(backend, problem, limits));
  merge(conformance::judge(expected, part, {.rounds_probabilities = rounds}), worst);
  return {};
}

}  // namespace

Problem Workload::problem(Op op) const {
  Problem problem = setting_.problem;
  problem.op = op;
  return problem;
}

Limits Workload::limits() const {
  return {.max_batch = setting_.batch,
          .max_tokens = tokens(),
          .max_seqlen_q = setting_.new_tokens,
          .max_seqlen_k = setting_.context,
          .max_threads = threads_.count()};
}

// ---- arguments ----------------------------------------------------------------------------------

int64_t Workload::extent(std::string_view letter) const {
  const Problem& p = setting_.problem;
  const std::pair<std::string_view, int64_t> known[] = {{"T", tokens()},
                                                        {"S", setting_.batch * setting_.context},
                                                        {"P", setting_.batch * blocks()},
                                                        {"Hq", p.heads_q},
                                                        {"Hkv", hkv()},
                                                        {"Hi", hkv()},
                                                        {"D", p.head_dim},
                                                        {"Di", p.index_dim},
                                                        {"Bk", p.block_size},
                                                        {"K", topk()},
                                                        {"blocks", blocks()},
                                                        {"parts", kParts},
                                                        {"NB+1", setting_.batch * blocks() + 1},
                                                        {"T*K", tokens() * topk()}};
  return std::ranges::find(known, letter, &std::pair<std::string_view, int64_t>::first)->second;
}

/// The array of an argument, which all operators share that call it the same. Extras but for LSEs
/// and ids are left out.
Status Workload::argument(Op op, const Argument& a, TensorView* out) {
  const bool wanted = a.name == std::string_view("lse") || a.content == Content::kBlocks;
  if (a.role == Role::kAbsent || (a.role == Role::kExtra && !wanted)) return {};
  for (const Made& made : kMade)
    if (made.op == op && made.argument == a.name) return result_of(made.by, made.output, out);
  const std::string_view letters = a.letters(setting_.problem.layout == KvLayout::kPaged);
  const std::string name = fmt::format("{} [{}]", a.name, letters);
  std::vector<int64_t> shape;
  for_each_letter(letters, [&](std::string_view letter) { shape.push_back(extent(letter)); });
  const bool i32 = a.content == Content::kI32 || a.content == Content::kBlocks;
  const bool f32 = a.content == Content::kF32 || (a.is_written() && op == Op::kKlBackward);
  const DType dtype = i32 ? DType::kI32 : f32 ? DType::kF32 : setting_.problem.dtype;
  if (a.is_written())
    *out = output(name, dtype, shape);
  else if (a.content == Content::kBlocks)
    return ids(out);
  else if (!i32)
    *out = input(name, shape, dtype);
  else if (a.name == std::string_view("num_valid_blocks"))
    *out = visible_blocks();
  else if (a.role == Role::kInput)
    *out = distinct_lists(name, shape);
  return {};
}

/// Runs an operator once and keeps one of its outputs as an input of others.
Status Workload::result_of(Op op, std::string_view name, TensorView* out) {
  const std::string kept = fmt::format("{} of {}", name, name_of(op));
  if (const auto known = arrays_.find(kept); known != arrays_.end()) {
    *out = known->second.view();
    return {};
  }
  Operation operation;
  MSA_TRY(bind(op, &operation));
  MSA_TRY(operation.run(0));
  MSA_TRY(fetch(operation.params));
  const TensorView& made = info_of(op).find(name)->in(data_of(operation.params));
  arrays_[kept] = Array(made.dtype, std::span(made.shape).first(static_cast<size_t>(made.rank)));
  *out = arrays_[kept].view();
  conformance::scatter(conformance::gather(made), *out);
  return {};
}

// ---- operations ---------------------------------------------------------------------------------

Status Workload::bind(Op op, Operation* out) {
  const OpInfo& info = info_of(op);
  for_each_op([&]<class P>(Op other) {
    if (other == op) out->params = P{};
  });
  void* const data = data_of(out->params);
  if (info.has_batch()) info.batch_in(data) = batch();
  for (const Argument& a : info.arguments)
    if (a.is_tensor()) MSA_TRY(argument(op, a, &a.in(data)));

  Problem here = problem(op);
  if (device_ != nullptr) here.device = {DeviceKind::kCUDA, 0};
  Plan plan;
  MSA_TRY(msa::plan(here, limits(), &plan, setting_.backend));
  out->backend = plan.backend;
  if (const Kernel* kernel = kernel_of(plan, params_ref(out->params))) out->kernel = kernel->name;
  out->cost = cost(plan.problem, setting_.new_tokens, setting_.context);
  out->cost.flops *= static_cast<double>(setting_.batch);
  out->cost.bytes *= static_cast<double>(setting_.batch);
  const auto has = [&](Role role, std::string_view letter) {
    return std::ranges::any_of(info.arguments, [&](const Argument& a) {
      return a.role == role && (letter.empty() || a.has_letter(letter));
    });
  };
  if (has(Role::kUpdated, "") || has(Role::kOutput, "T*K"))
    out->verify = verify_whole(op, *out);
  else
    out->verify = has(Role::kOutput, "S") ? verify_gradients(op, *out) : verify_rows(op, *out);
  if (device_ != nullptr) return bind_on_device(plan, out);
  auto memory = std::make_shared<Array>(Array::bytes_for(plan));
  out->run = [=, params = out->params, threads = &threads_](int) {
    return msa::run(plan, params_ref(params), memory->workspace(), {.threads = threads});
  };
  return {};
}

Status Workload::bind_on_device(const Plan& plan, Operation* out) {
  auto memory = std::make_shared<conformance::DeviceMemory>();
  const auto bytes = static_cast<size_t>(std::max<int64_t>(1, plan.workspace_bytes));
  MSA_TRY(conformance::DeviceMemory::allocate(bytes, memory.get()));
  Params placed;
  MSA_TRY(on_device(out->params, 0, &placed));  // upload before anything is timed
  out->copies = copies_beyond_l2(out->cost.bytes);
  out->run = [=, this, params = out->params](int copy) {
    Params args;
    MSA_TRY(on_device(params, copy, &args));
    return msa::run(plan, params_ref(args), Workspace{memory->data(), bytes},
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

/// Index selection, then attention. Over its own selection that is a layer; given lists (a trace,
/// random ids) the attention reads instead of what was just selected.
Status Workload::bind_msa(Operation* out) {
  if (setting_.selection == "index") return bind(Op::kLayer, out);
  Operation select;
  MSA_TRY(bind(Op::kIndexSelect, &select));
  MSA_TRY(bind(Op::kSparseAttention, out));
  out->kernel = select.kernel + ", " + out->kernel;
  out->cost.flops += select.cost.flops;
  out->cost.bytes += select.cost.bytes;
  out->copies = std::min(select.copies, out->copies);
  out->run = [first = select.run, then = out->run](int copy) {
    MSA_TRY(first(copy));
    return then(copy);
  };
  out->verify = [first = select.verify, then = out->verify](Verdict* verdict) {
    MSA_TRY(first(verdict));
    return then(verdict);
  };
  return {};
}

Status Workload::add(const std::string& name, Operation* out) {
  MSA_TRY(name == "msa" ? bind_msa(out) : bind(find_op(name)->op, out));
  out->op = name;
  return {};
}

// ---- verdicts -----------------------------------------------------------------------------------

/// Of an operator that is cheap enough to be judged as a whole.
Workload::Verify Workload::verify_whole(Op op, const Operation& of) {
  return [=, this, backend = of.backend, params = of.params](Verdict* verdict) -> Status {
    MSA_TRY(fetch(params));
    return add_verdict(problem(op), limits(), *backend, params, &threads_, verdict);
  };
}

/// What judge(i, &verdict, &what) says of `count` samples, each with what it was if it is wrong.
template <class Judge>
Status Workload::each_sample(int64_t count, Verdict* worst, const Judge& judge) {
  std::mutex mutex;
  Status failed;
  threads_.parallel_for(count, [&](int64_t task, int) {
    Verdict verdict;
    std::string what;
    const Status status = judge(count - 1 - task, &verdict, &what);  // the longest begin
    if (!verdict.ok()) verdict.failure = fmt::format("{}: {}", what, verdict.failure);
    const std::scoped_lock lock(mutex);
    if (failed.ok()) failed = status;
    merge(verdict, worst);
  });
  return failed;
}

/// A query row with all of its keys, as a batch of its own.
Params Workload::row_of(const Params& params, int64_t row, const Batch& batch) const {
  const bool paged = setting_.problem.layout == KvLayout::kPaged;
  Params one = cut(params, paged, "T", row, 1);
  one = cut(one, paged, "S", row / setting_.new_tokens * setting_.context, setting_.context);
  const OpInfo& info = info_of(params_ref(one).op());
  if (info.has_batch()) info.batch_in(data_of(one)) = batch;
  return one;
}

/// Of an operator whose rows do not depend on each other; up to 32 of them are judged.
Workload::Verify Workload::verify_rows(Op op, const Operation& of) {
  return [=, this, backend = of.backend, params = of.params](Verdict* worst) -> Status {
    MSA_TRY(fetch(params));
    const int64_t count = std::min(kSamples, tokens());
    const TensorView pages = batch().page_table;
    const Limits one_token{.max_seqlen_k = setting_.context, .max_threads = 1};
    return each_sample(count, worst, [&](int64_t i, Verdict* verdict, std::string* what) {
      // The first and the last row, and others between them at odd places.
      int64_t row = count > 1 ? i * (tokens() - 1) / (count - 1) : 0;
      if (i > 0 && i + 1 < count) row = std::min(tokens() - 1, row + i * 37 % 61);
      *what = fmt::format("query row {}", row);
      const Sample sample(position(row), setting_.context,
                          pages.given() ? slice(pages, 0, row / setting_.new_tokens, 1) : pages);
      return add_verdict(problem(op), one_token, *backend, row_of(params, row, sample.batch()),
                         nullptr, verdict);
    });
  };
}

/// Gradients are sums over the whole batch: a query sees all of its keys, but is one of many that
/// reach them. So samples of queries judge one kind of output, samples of keys the other.
Workload::Verify Workload::verify_gradients(Op op, const Operation& of) {
  return [=, this, backend = of.backend, params = of.params](Verdict* worst) -> Status {
    MSA_TRY(fetch(params));
    const int64_t queries = std::min(kSamples, tokens()), keys = std::min(kKeySamples, blocks());
    const auto weight = [&](int64_t count) {  // float32 outputs only
      return op == Op::kKlBackward ? static_cast<float>(tokens()) / static_cast<float>(count)
                                   : 1.0f;
    };
    const auto judge_query = [&](int64_t row, Verdict* verdict) {
      const Sample sample(position(row), setting_.context, {});
      const Limits limits{.max_seqlen_k = setting_.context, .max_threads = 1};
      return judge_part(problem(op), limits, *backend, row_of(params, row, sample.batch()), "T",
                        weight(1), verdict);
    };
    // The first keys of a block, all queries of the sequence.
    const auto judge_keys = [&](int64_t sequence, int64_t block, Verdict* verdict) {
      const int64_t first = block * setting_.problem.block_size, count = setting_.new_tokens;
      const int32_t cu_q[] = {0, static_cast<int32_t>(count)};
      const int32_t cu_k[] = {
          0, static_cast<int32_t>(std::min(kSampledKeys, setting_.context - first))};
      const auto q_offset = static_cast<int32_t>(setting_.context - count);
      const auto block_offset = static_cast<int32_t>(block);
      const auto view = [](const int32_t* data, int64_t n) {
        return TensorView::contiguous(data, DType::kI32, {n});
      };
      Params part = cut(params, false, "T", sequence * count, count);
      part = cut(part, false, "S", sequence * setting_.context + first, cu_k[1]);
      info_of(op).batch_in(data_of(part)) = {.cu_seqlens_q = view(cu_q, 2),
                                             .cu_seqlens_k = view(cu_k, 2),
                                             .q_offset = view(&q_offset, 1),
                                             .block_offset = view(&block_offset, 1)};
      const Limits limits{.max_tokens = count,
                          .max_seqlen_q = count,
                          .max_seqlen_k = kSampledKeys,
                          .max_threads = 1};
      return judge_part(problem(op), limits, *backend, part, "S", weight(count), verdict);
    };
    return each_sample(queries + keys, worst, [&](int64_t i, Verdict* verdict, std::string* what) {
      if (i < queries) {
        const int64_t row = queries > 1 ? i * (tokens() - 1) / (queries - 1) : 0;
        *what = fmt::format("query row {}", row);
        return judge_query(row, verdict);
      }
      const int64_t sequence = (i - queries) % setting_.batch;
      const int64_t block = keys > 1 ? (i - queries) * (blocks() - 1) / (keys - 1) : 0;
      *what = fmt::format("key {} of sequence {}", block * setting_.problem.block_size, sequence);
      return judge_keys(sequence, block, verdict);
    });
  };
}

}  // namespace msa::cli
