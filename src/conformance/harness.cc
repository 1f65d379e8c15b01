#include "conformance/harness.h"

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>

#include "core/text.h"
#include "reference/rows.h"

namespace msa::conformance {
namespace {

constexpr size_t kWorkspaceGuard = 64;

/// One way of running the same call. Results may depend on none of this.
struct Repeat {
  const char* what;
  bool parallel;
  std::byte poison;  ///< what outputs and workspace hold before
};
constexpr Repeat kRepeats[] = {{"1 thread", false, std::byte{0x5a}},
                               {"N threads", true, std::byte{0xff}},
                               {"N threads again", true, std::byte{0x00}}};

Status call_here(const Plan& plan, const Params& params, Workspace workspace, Threads* threads) {
  return std::visit(
      [&](const auto& a) { return msa::run(plan, a, workspace, {.threads = threads}); }, params);
}

/// The same on a device, with copies of `memory`, in which all arguments and the workspace lie.
Status call_on_device(const Plan& plan, Params params, Workspace workspace,
                      std::span<const HostRange> memory) {
  DeviceCopies copies;
  MSA_TRY(DeviceCopies::make(memory, &copies));
  for (TensorView* view : arguments(params)) {
    view->device = plan.problem.device;
    view->data = copies.address(view->data);
  }
  workspace.data = copies.address(workspace.data);
  MSA_TRY(call_here(plan, params, workspace, nullptr));
  return copies.bring_back();
}

/// Calls the operator. All arguments lie in `memory`, the workspace in `scratch`.
Status call(const Plan& plan, const Params& params, HostRange scratch,
            std::vector<HostRange> memory, Threads* threads) {
  const auto bytes = static_cast<size_t>(plan.workspace_bytes);
  const Workspace workspace{bytes == 0 ? nullptr : scratch.data(), bytes};
  if (plan.backend->device == DeviceKind::kCPU) return call_here(plan, params, workspace, threads);
  memory.push_back(scratch);
  return call_on_device(plan, params, workspace, memory);
}

/// True when index_select's forced blocks are those of select_blocks: the query's local block is
/// the last one it sees.
bool ends_at_local_block(const Case& c) {
  if (c.block_offsets) return false;
  if (!c.causal) return true;
  if (c.q_offsets) return false;
  return std::all_of(c.sequences.begin(), c.sequences.end(),
                     [](const SequenceSize& s) { return s.kv_len >= s.q_len; });
}

}  // namespace

Harness::Harness(int threads) : threads_(std::max(2, threads)) {}

std::vector<Result> Harness::run(const Case& c, std::span<const Backend* const> backends) {
  std::map<int64_t, std::unique_ptr<Instance>> instances;  // by alignment
  const auto instance_for = [&](int64_t alignment) -> Instance& {
    auto& instance = instances[alignment];
    if (instance == nullptr) instance = std::make_unique<Instance>(c, alignment);
    return *instance;
  };
  Instance& plain = instance_for(1);
  plain.poison_outputs(std::byte{0xff});
  Expected expected;  // of all instances: their contents are the same
  const Status status = expect(c.problem, plain.limits(), plain.params(), &threads_, &expected);
  std::vector<Result> results;
  for (const Backend* backend : backends) {
    const auto start = std::chrono::steady_clock::now();
    if (status.ok())
      results.push_back(run(instance_for(alignment(plan_on(*backend, c.problem, plain.limits()))),
                            expected, *backend));
    else
      results.push_back({backend, Outcome::kFailed, "the judge: " + status.message()});
    const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start;
    results.back().seconds = spent.count();
  }
  return results;
}

Result Harness::run(Instance& instance, const Expected& expected, const Backend& backend) {
  if (const Status status = supported_on(backend, instance.problem(), instance.limits());
      !status.ok())
    return {&backend, Outcome::kSkipped, status.message()};
  if (instance.repeat_ids() && backend.device == DeviceKind::kCPU) {
    const std::string failure = refuse_repeated(instance, backend);
    return {&backend, failure.empty() ? Outcome::kPassed : Outcome::kFailed, failure};
  }
  Verdict verdict;
  std::string failure = repeat(instance, expected, backend, &verdict);
  if (failure.empty() && instance.problem().op == Op::kIndexSelect)
    failure = two_steps(instance, backend);
  return {&backend, failure.empty() ? Outcome::kPassed : Outcome::kFailed, failure,
          verdict.max_error};
}

/// Runs the call in every way of kRepeats; returns what is wrong.
std::string Harness::repeat(Instance& instance, const Expected& expected, const Backend& backend,
                            Verdict* verdict) {
  const uint64_t inputs = instance.input_hash();
  std::vector<std::vector<std::byte>> first;
  for (const Repeat& way : kRepeats) {
    Limits limits = instance.limits();
    limits.max_threads = way.parallel ? threads_.count() : 1;
    const Plan plan = plan_on(backend, instance.problem(), limits);
    const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
    std::byte* const workspace = make_workspace(bytes + kWorkspaceGuard, &scratch_);
    instance.poison_outputs(way.poison);
    std::fill_n(workspace, bytes + kWorkspaceGuard, way.poison);

    const Status status = call(plan, instance.params(), {workspace, bytes + kWorkspaceGuard},
                               instance.memory(), way.parallel ? &threads_ : nullptr);
    if (!status.ok()) return text("run with ", way.what, ": ", status.message());
    if (std::any_of(workspace + bytes, workspace + bytes + kWorkspaceGuard,
                    [&](std::byte b) { return b != way.poison; }))
      return text("writes behind its workspace of ", bytes, " bytes");
    if (instance.input_hash() != inputs) return "writes into its inputs";
    if (first.empty()) {
      const Case& c = instance.test_case();
      *verdict = judge(expected, instance.params(),
                       {.exact_scores = c.exact_scores(),
                        .exact_softmax = c.exact_softmax(),
                        .spoiled = c.first_sequence_spoiled() ? c.sequences[0] : SequenceSize{},
                        .rounds_probabilities = rounds_probabilities(plan)});
      if (!verdict->ok()) return verdict->failure;
    }
    bool untouched = false;
    std::vector<std::vector<std::byte>> taken = instance.take_outputs(&untouched);
    if (!untouched) return "writes outside its outputs";
    if (first.empty()) first = taken;
    if (first != taken)
      return text("results with ", way.what, " differ from those with ", kRepeats[0].what,
                  ", or an output is not written everywhere");
  }
  return {};
}

/// Lists in host memory are looked at before the backend sees them.
std::string Harness::refuse_repeated(Instance& instance, const Backend& backend) {
  const Plan plan = plan_on(backend, instance.problem(), instance.limits());
  const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
  const Status status =
      call(plan, instance.params(), {make_workspace(bytes, &scratch_), bytes}, {}, nullptr);
  if (status.code() == StatusCode::kInvalidArgument &&
      status.message().find("a second time") != std::string::npos)
    return {};
  return text("a block twice in a list: got ", status.ok() ? "a result" : status.message(),
              ", expected an error that names it");
}

/// index_select must choose what the backend's own index_scores and select_blocks choose.
std::string Harness::two_steps(Instance& instance, const Backend& backend) {
  if (!ends_at_local_block(instance.test_case())) return {};
  const IndexSelectParams fused = std::get<IndexSelectParams>(instance.params());
  const Problem& p = instance.problem();
  const int64_t tokens = fused.q_idx.shape[0];
  const int64_t blocks = (instance.limits().max_seqlen_k + p.block_size - 1) / p.block_size;
  std::vector<float> scores(static_cast<size_t>(p.heads_kv * tokens * blocks));
  std::vector<int32_t> valid(static_cast<size_t>(tokens)),
      lists[2]{std::vector<int32_t>(static_cast<size_t>(p.heads_kv * tokens * p.topk)), {}};
  lists[1] = lists[0];
  for (int64_t t = 0; t < tokens; ++t)
    valid[static_cast<size_t>(t)] =
        static_cast<int32_t>(reference::query_at(fused.batch, t, p.block_size).visible_blocks());

  const auto ids = [&](int i) {
    return TensorView::contiguous(lists[i].data(), DType::kI32, {p.heads_kv, tokens, p.topk});
  };
  const TensorView score_view =
      TensorView::contiguous(scores.data(), DType::kF32, {p.heads_kv, tokens, blocks});
  const std::pair<Op, Params> steps[] = {
      {Op::kIndexSelect,
       IndexSelectParams{
           .q_idx = fused.q_idx, .k_idx = fused.k_idx, .batch = fused.batch, .block_ids = ids(0)}},
      {Op::kIndexScores,
       IndexScoresParams{
           .q_idx = fused.q_idx, .k_idx = fused.k_idx, .batch = fused.batch, .scores = score_view}},
      {Op::kSelectBlocks, SelectBlocksParams{.scores = score_view,
                                             .num_valid_blocks = TensorView::contiguous(
                                                 valid.data(), DType::kI32, {tokens}),
                                             .block_ids = ids(1)}}};
  std::vector<HostRange> memory = instance.memory();
  for (const auto& tensor :
       {std::as_writable_bytes(std::span(scores)), std::as_writable_bytes(std::span(lists[0])),
        std::as_writable_bytes(std::span(lists[1]))})
    memory.push_back(tensor);
  for (const auto& [op, params] : steps) {
    Problem problem = p;
    problem.op = op;
    // Selection is exact, so any backend's will do.
    const Backend& step = op == Op::kSelectBlocks ? *find_backend("reference") : backend;
    Limits limits = instance.limits();
    limits.max_threads = 1;
    if (!supported_on(step, problem, limits).ok()) return {};
    const Plan plan = plan_on(step, problem, limits);
    const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
    const Status status =
        call(plan, params, {make_workspace(bytes, &scratch_), bytes}, memory, nullptr);
    if (!status.ok()) return text(name_of(op), " after ", name_of(p.op), ": ", status.message());
  }
  const auto [at, end] = std::mismatch(lists[0].begin(), lists[0].end(), lists[1].begin());
  if (at == lists[0].end()) return {};
  return text("ids differ from index_scores + select_blocks of the same backend at element ",
              at - lists[0].begin(), ": got ", *at, ", expected ", *end);
}

}  // namespace msa::conformance
