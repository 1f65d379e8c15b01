// msa attend: the operators on tensors from any framework, file to file.
#include "msa/attend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>

#include "model/safetensors.h"
#include "msa/commands.h"
#include "msa/common.h"

namespace msa::cli {
namespace {

constexpr const char* kFloatNames[] = {"q", "k", "v", "q_idx", "k_idx"};
constexpr const char* kIntegerNames[] = {"block_ids", "cu_seqlens_q", "cu_seqlens_k", "page_table",
                                         "seq_lens"};

/// The tensors of a file as aligned arrays: floats as they are, integers as i32.
class Inputs {
 public:
  Status read(std::span<const std::byte> file) {
    std::vector<model::TensorEntry> entries;
    MSA_TRY(model::parse_safetensors(file, &entries));
    for (const model::TensorEntry& entry : entries) {
      const bool old = entry.name == "ids";
      const std::string name = old ? "block_ids" : entry.name;
      if (old)
        fmt::print(stderr, "msa: warning: ids is deprecated, its name is {}; gone in 0.3\n", name);
      const auto is = [&](const char* known) { return name == known; };
      const bool integers = std::ranges::any_of(kIntegerNames, is);
      if (!integers && !std::ranges::any_of(kFloatNames, is))
        return bad_input("tensor \"{}\": unknown name, expected {}, {}", entry.name,
                         fmt::join(kFloatNames, ", "), fmt::join(kIntegerNames, ", "));
      if (entry.shape.empty() || entry.shape.size() > kMaxRank)
        return bad_input("{}: got rank {}, expected 1 to {}", name, entry.shape.size(), kMaxRank);
      DType dtype = DType::kI32;
      std::vector<int32_t> values;
      if (integers) {
        MSA_TRY(model::read_int32(entry, &values));
      } else if (!model::dtype_of(entry.dtype, &dtype) || dtype == DType::kI32) {
        return bad_input("{}: got dtype {}, expected F32, BF16 or F16", name, entry.dtype);
      }
      Array array(dtype, entry.shape);
      const void* source = integers ? static_cast<const void*>(values.data()) : entry.bytes.data();
      const int64_t bytes = array.view().numel() * size_of(dtype);
      std::copy_n(static_cast<const std::byte*>(source), bytes, array.data<std::byte>());
      arrays_[name] = std::move(array);
    }
    return {};
  }

  bool has(const std::string& name) const { return arrays_.contains(name); }
  /// A default view when not there.
  TensorView operator[](const std::string& name) const {
    const auto entry = arrays_.find(name);
    return entry == arrays_.end() ? TensorView{} : entry->second.view();
  }
  Status need(const std::string& name, int rank, TensorView* out) const {
    if (!has(name)) return bad_input("{}: no such tensor in the file", name);
    *out = (*this)[name];
    if (out->rank != rank) return bad_input("{}: got rank {}, expected {}", name, out->rank, rank);
    for (int axis = 0; axis < rank; ++axis)
      if (out->shape[static_cast<size_t>(axis)] > INT32_MAX)
        return bad_input("{}: an extent exceeds 2^31 - 1", name);
    return {};
  }
  const TensorView& add(const std::string& name, const std::vector<int32_t>& values) {
    return (arrays_[name] = Array::i32(values)).view();
  }

 private:
  std::map<std::string, Array> arrays_;
};

/// One invocation: arguments, and the outputs as they come.
struct Call {
  const AttendOptions& options;
  Threads& threads;
  Inputs inputs{};
  Problem problem{};
  Batch batch{};
  Limits limits{};
  bool select = false, sparse = false;

  TensorView q{}, k{}, v{}, q_idx{}, k_idx{}, ids{};

  std::string op() const {
    if (!options.op.empty()) return options.op;
    if (!inputs.has("q")) return "index_select";
    if (inputs.has("block_ids")) return "sparse_attention";
    return inputs.has("q_idx") ? "msa" : "dense_attention";
  }

  /// Finds the tensors of the operator and reads the problem off their shapes.
  Status bind(const std::string& op) {
    select = op == "index_select" || op == "msa";
    sparse = op == "sparse_attention" || op == "msa";
    const bool attention = op != "index_select";
    const bool paged = inputs.has("page_table");
    problem.layout = paged ? KvLayout::kPaged : KvLayout::kPacked;
    if (attention) {
      MSA_TRY(inputs.need("q", 3, &q));
      MSA_TRY(inputs.need("k", paged ? 4 : 3, &k));
      MSA_TRY(inputs.need("v", paged ? 4 : 3, &v));
      problem.dtype = q.dtype;
      problem.heads_q = static_cast<int32_t>(q.shape[1]);
      problem.heads_kv = static_cast<int32_t>(k.shape[1]);
      problem.head_dim = static_cast<int32_t>(q.shape[2]);
    }
    if (select) {
      MSA_TRY(inputs.need("q_idx", 3, &q_idx));
      MSA_TRY(inputs.need("k_idx", paged ? 3 : 2, &k_idx));
      problem.dtype = q_idx.dtype;
      problem.index_dim = static_cast<int32_t>(q_idx.shape[2]);
      if (!attention) problem.heads_q = problem.heads_kv = static_cast<int32_t>(q_idx.shape[1]);
      if (attention && q_idx.shape[0] != q.shape[0])
        return bad_input("q_idx: got {} rows, q has {}", q_idx.shape[0], q.shape[0]);
    } else if (sparse) {
      MSA_TRY(inputs.need("block_ids", 3, &ids));
    }
    const TensorView& keys = attention ? k : k_idx;
    const int64_t page = paged ? keys.shape[static_cast<size_t>(keys.rank) - 2] : 128;
    problem.block_size = options.block > 0 ? options.block : static_cast<int32_t>(page);
    problem.topk = options.topk > 0 ? options.topk
                   : ids.given()    ? static_cast<int32_t>(ids.shape[2])
                                    : 16;
    problem.init_blocks = options.init_blocks;
    problem.local_blocks = options.local_blocks;
    MSA_TRY(validate(problem));
    return bind_batch(attention ? q.shape[0] : q_idx.shape[0], keys);
  }

  Status bind_batch(int64_t tokens, const TensorView& keys) {
    const bool paged = problem.layout == KvLayout::kPaged;
    int64_t longest = keys.shape[0];
    if (paged) {
      MSA_TRY(inputs.need("page_table", 2, &batch.page_table));
      MSA_TRY(inputs.need("seq_lens", 1, &batch.seq_lens));
      longest = batch.page_table.shape[1] * problem.block_size;
    }
    const auto one_sequence = [&](const char* name, int64_t rows, TensorView* out) -> Status {
      if (inputs.has(name)) return inputs.need(name, 1, out);
      if (paged && batch.seq_lens.shape[0] != 1)
        return bad_input("{}: no such tensor in the file, needed for more than one sequence", name);
      *out = inputs.add(name, {0, static_cast<int32_t>(rows)});
      return {};
    };
    MSA_TRY(one_sequence("cu_seqlens_q", tokens, &batch.cu_seqlens_q));
    if (!paged) MSA_TRY(one_sequence("cu_seqlens_k", keys.shape[0], &batch.cu_seqlens_k));
    batch.causal = options.causal;
    limits = {.max_batch = std::max<int64_t>(1, batch.cu_seqlens_q.shape[0] - 1),
              .max_tokens = std::max<int64_t>(1, tokens),
              .max_seqlen_q = std::max<int64_t>(1, tokens),
              .max_seqlen_k = std::max<int64_t>(1, longest),
              .max_threads = threads.count()};
    return {};
  }

  /// One operator; its outputs are judged when asked for.
  template <class Params>
  Status run(Op op, const Params& params, AttendResult* out) {
    problem.op = op;
    Plan plan;
    MSA_TRY(msa::plan(problem, limits, &plan, options.backend));
    out->backend = plan.backend;
    const Array memory = Array::bytes_for(plan);
    Status status;
    out->seconds += seconds_of(
        [&] { status = msa::run(plan, params, memory.workspace(), Queue{.threads = &threads}); });
    MSA_TRY(status);
    if (!options.check) return {};
    if (!out->verdict) out->verdict.emplace();
    return add_verdict(problem, limits, *plan.backend, params, &threads, &*out->verdict);
  }

  Status compute(AttendResult* out) {
    const auto output = [&](const char* name, DType dtype, std::initializer_list<int64_t> shape) {
      return out->outputs.emplace_back(name, Array(dtype, shape)).second.view();
    };
    TensorView lists = ids;
    if (select) {
      lists = output("block_ids", DType::kI32, {problem.heads_kv, q_idx.shape[0], problem.topk});
      const IndexSelectParams params{
          .q_idx = q_idx, .k_idx = k_idx, .batch = batch, .block_ids = lists};
      MSA_TRY(run(Op::kIndexSelect, params, out));
    }
    if (!q.given()) return {};
    const TensorView o = output("o", q.dtype, {q.shape[0], q.shape[1], q.shape[2]});
    const TensorView lse = output("lse", DType::kF32, {q.shape[0], q.shape[1]});
    if (sparse)
      return run(Op::kSparseAttention,
                 SparseAttentionParams{.q = q,
                                       .k = k,
                                       .v = v,
                                       .block_ids = lists,
                                       .batch = batch,
                                       .softmax_scale = options.scale.value_or(0),
                                       .o = o,
                                       .lse = lse},
                 out);
    return run(Op::kDenseAttention,
               DenseAttentionParams{.q = q,
                                    .k = k,
                                    .v = v,
                                    .batch = batch,
                                    .softmax_scale = options.scale.value_or(0),
                                    .o = o,
                                    .lse = lse},
               out);
  }
};

struct Options : AttendOptions {
  Common common;
  std::string input, output, json;
};

Status run_attend(Options options, bool* passed) {
  options.backend = options.common.backend;
  if (options.scale && (!std::isfinite(*options.scale) || *options.scale == 0))
    return bad_input("--scale: got {}, expected a finite number other than 0", *options.scale);
  std::unique_ptr<model::MappedFile> file;
  MSA_TRY(model::MappedFile::open(options.input, &file));
  for (const std::string& path : {options.output, options.json}) MSA_TRY(check_writable(path));

  Threads threads(options.common.threads);
  AttendResult result;
  MSA_TRY(model::in_file(options.input, attend(file->bytes(), options, threads, &result)));

  nlohmann::ordered_json report = {{"op", result.op},
                                   {"backend", result.backend->name},
                                   {"threads", threads.count()},
                                   {"seconds", result.seconds},
                                   {"input", options.input},
                                   {"output", options.output},
                                   {"outputs", nlohmann::ordered_json::object()},
                                   {"check", nullptr}};
  std::vector<std::pair<std::string, TensorView>> tensors;
  for (const auto& [name, array] : result.outputs) {
    const TensorView& view = array.view();
    tensors.emplace_back(name, view);
    report["outputs"][name] = {
        {"dtype", name_of(view.dtype)},
        {"shape", std::vector(view.shape.begin(), view.shape.begin() + view.rank)}};
  }
  *passed = !result.verdict || result.verdict->ok();
  if (result.verdict)
    report["check"] = {{"passed", *passed},
                       {"max_error", result.verdict->max_error},
                       {"failure", result.verdict->failure}};
  MSA_TRY(write_atomically(
      options.output, [&](std::FILE* file) { return model::write_safetensors(file, tensors); }));
  MSA_TRY(write_json(options.json, report));
  if (!is_stdout(options.json) && !is_stdout(options.output)) {
    fmt::print("{} on {}, {}: ", result.op, result.backend->name, human_seconds(result.seconds));
    for (const auto& [name, view] : tensors)
      fmt::print("{} {}{} ", name, name_of(view.dtype),
                 model::shape_text(std::span(view.shape.data(), static_cast<size_t>(view.rank))));
    fmt::print("-> {}\n", options.output);
    if (result.verdict)
      fmt::print("check against the reference: {}, max error {:.2e}\n",
                 *passed ? "ok" : "FAILED, " + result.verdict->failure, result.verdict->max_error);
  }
  return {};
}

}  // namespace

Status attend(std::span<const std::byte> file, const AttendOptions& options, Threads& threads,
              AttendResult* out) try {
  Call call{.options = options, .threads = threads};
  MSA_TRY(call.inputs.read(file));
  out->op = call.op();
  MSA_TRY(call.bind(out->op));
  return call.compute(out);
} catch (const std::exception& error) {  // sizes beyond the machine's memory
  return Status(StatusCode::kUnavailable, error.what());
}

CLI::App* add_attend(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand(
      "attend", "Operators on tensors from any framework: safetensors in, safetensors out");
  command
      ->add_option("--input", options->input, "q, k, v, q_idx, k_idx, block_ids, cu_seqlens_q, ...")
      ->required();
  command->add_option("--output", options->output, "Receives o and lse, block_ids")->required();
  command->add_option("--op", options->op, "Default: what the tensors allow")
      ->check(CLI::IsMember({"index_select", "sparse_attention", "dense_attention", "msa"}));
  command->add_flag("--check", options->check, "Compare with the reference; exit code 1 if wrong");
  command->add_option("--block", options->block, "Block size; default the page size, or 128")
      ->check(CLI::Range(1, 1 << 24));
  command
      ->add_option("--topk", options->topk,
                   "Blocks per query; default the width of block_ids, or 16")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--init-blocks", options->init_blocks, "Forced blocks at the start")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--local-blocks", options->local_blocks, "Forced blocks at the end")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  command->add_option("--scale", options->scale, "Softmax scale; default 1/sqrt(D)");
  command->add_flag("--causal,!--no-causal", options->causal, "Causal mask (default)");
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  add_common(command, &options->common);
  command->footer(
      "Tensors carry the argument names of the operators; with page_table and seq_lens the keys\n"
      "are pages; without cu_seqlens_q and cu_seqlens_k all rows are one sequence.\n"
      "Example:\n  msa attend --input in.safetensors --output out.safetensors --check");
  command->callback([=] { *action = [=](bool* passed) { return run_attend(*options, passed); }; });
  return command;
}

}  // namespace msa::cli
