// msa bench: verdict first, then time, beside the work done and the machine's measured ceilings.
#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>
#include <vector>

#include "conformance/random.h"
#include "cpu/ceiling.h"
#include "msa/bench_ops.h"
#include "msa/commands.h"
#include "msa/common.h"
#include "msa/cuda_timer.h"

namespace msa::cli {
namespace {

using json = nlohmann::ordered_json;

struct Options {
  Common common;
  std::vector<std::string> ops;
  std::string shape = "code-11m";
  std::vector<int64_t> contexts = {8192};
  int64_t new_tokens = 0;  // 0 = the whole context
  int64_t batch = 1;
  std::string dtype, layout, selection = "index", json, tsv;
  int repeats = 0;  // 0 = until two seconds per operator, 5 to 100
};

Status parse_shape(const std::string& text, Problem* problem) {
  const std::string numbers = text == "m3"         ? "64,4,128,128,16"
                              : text == "code-11m" ? "16,2,128,128,16"
                                                   : text;
  std::vector<int32_t*> fields = {&problem->heads_q, &problem->heads_kv, &problem->head_dim,
                                  &problem->block_size, &problem->topk};
  size_t field = 0;
  for (const std::string& part : CLI::detail::split(numbers, ',')) {
    int32_t value = 0;
    if (field == fields.size() || !CLI::detail::lexical_cast(part, value) || value < 1 ||
        value > 1 << 16) {
      field = 0;
      break;
    }
    *fields[field++] = value;
  }
  if (field != fields.size())
    return bad_input(
        "--shape: got \"{}\", expected m3, code-11m or HQ,HKV,D,BK,K with values 1..65536", text);
  problem->index_dim = problem->head_dim;
  return validate(*problem);
}

/// Reads a buffer as large as the last-level cache, so that the next call finds its data in memory.
class Evictor {
 public:
  Evictor() : data_(size(), 1) {}
  void evict() { sink_ = std::accumulate(data_.begin(), data_.end(), uint64_t{0}); }

 private:
  static size_t size() {
    const int64_t cache = sysconf(_SC_LEVEL3_CACHE_SIZE);
    return static_cast<size_t>(std::clamp<int64_t>(cache, 64 << 20, 512 << 20)) / 8;
  }
  std::vector<uint64_t> data_;
  volatile uint64_t sink_ = 0;
};

/// An operation, its verdict and its times.
struct Measured {
  Operation operation{};
  KvLayout layout{};
  Verdict verdict{};
  double checked_seconds = 0;  ///< of the call that was checked
  std::vector<double> seconds{};
  std::function<Status(double*)> replay{};  ///< on a device: `calls` calls
  int calls = 1;
};

struct Machine {
  Threads threads;
  Evictor evictor;
  std::unique_ptr<CudaTimer> device;    // null for the CPU
  double bandwidth = 0;                 // bytes per second
  std::map<std::string, double> peaks;  // FLOP per second, by backend

  Machine(int count, std::unique_ptr<CudaTimer> cuda)
      : threads(count),
        device(std::move(cuda)),
        bandwidth(device != nullptr ? device->read_bandwidth() : cpu::read_bandwidth(threads)) {}
  double peak(const Backend& backend) {
    const auto [entry, is_new] = peaks.try_emplace(backend.name);
    if (is_new)
      entry->second = device != nullptr ? device->peak_flops() : cpu::peak_flops(backend, threads);
    return entry->second;
  }
};

/// A graph of calls that use all copies of the data in turn, long enough that starting it does not
/// count: a millisecond, or one call. Warmed up by five replays, or one of a long call; of a very
/// long one the checked call was enough.
Status record(Machine* machine, Measured* one) {
  constexpr double kShort = 1e-3, kLong = 0.5, kVeryLong = 5;
  constexpr int kMostCalls = 256;
  const Operation& operation = one->operation;
  const auto capture = [&](int calls) {
    one->calls = calls;
    return machine->device->capture(
        [&]() -> Status {
          for (int i = 0; i < calls; ++i) MSA_TRY(operation.run(i % operation.copies));
          return {};
        },
        &one->replay);
  };
  if (one->checked_seconds > kVeryLong) return capture(1);
  for (int copy = 0; copy < operation.copies; ++copy) MSA_TRY(operation.run(copy));
  MSA_TRY(machine->device->wait());
  double seconds = 0;
  MSA_TRY(capture(operation.copies));
  MSA_TRY(one->replay(&seconds));
  const double each = std::max(seconds / one->calls, 1e-7);
  if (seconds < kShort)
    MSA_TRY(capture(static_cast<int>(std::min<double>(kMostCalls, std::ceil(kShort / each)))));
  for (int i = 0; i < (each > kLong ? 0 : 5); ++i) MSA_TRY(one->replay(&seconds));
  return {};
}

/// Seconds of one call.
Status time_call(Machine* machine, Measured* one, double* seconds) {
  if (machine->device != nullptr) {
    MSA_TRY(one->replay(seconds));
    *seconds /= one->calls;
    return {};
  }
  if (one->seconds.empty() || one->seconds.back() < 0.1) machine->evictor.evict();
  Status status;
  *seconds = seconds_of([&] { status = one->operation.run(0); });
  return status;
}

/// Rounds of all operations, interleaved: a slow moment of the machine hits all alike. Each in
/// another order: whatever follows dense attention finds a GPU at its power limit.
Status measure(const Options& options, Machine* machine, std::vector<Measured>* all,
               Progress* progress) {
  const auto start = std::chrono::steady_clock::now();
  const auto budget = std::chrono::seconds(2) * all->size();
  const int least = machine->device != nullptr ? 3 : 5,
            most = machine->device != nullptr ? 20 : 100;
  const auto wants_more = [&](int round) {
    if (options.repeats > 0) return round < options.repeats;
    return round < least || (round < most && std::chrono::steady_clock::now() - start < budget);
  };
  if (machine->device != nullptr) {
    for (Measured& one : *all)
      if (one.verdict.ok()) MSA_TRY(record(machine, &one));
  }
  conformance::Rng rng(1);
  std::vector<size_t> order(all->size());
  std::iota(order.begin(), order.end(), 0);
  for (int round = 0; wants_more(round); ++round) {
    rng.shuffle(order);
    for (const size_t i : order) {
      Measured& one = (*all)[i];
      if (!one.verdict.ok()) continue;
      double seconds = 0;
      MSA_TRY(time_call(machine, &one, &seconds));
      one.seconds.push_back(seconds);
    }
    const int rounds = options.repeats > 0 ? options.repeats : std::max(least, round + 1);
    progress->update(round + 2, rounds + 1);  // the verdicts took about one round
  }
  return {};
}

json row_of(const Options& options, const Setting& setting, const Measured& one,
            const Measured* dense, Machine* machine) {
  const Problem& p = setting.problem;
  const Operation& operation = one.operation;
  const bool timed = !one.seconds.empty();
  const Quantiles seconds = quantiles(one.seconds);
  const double peak = machine->peak(*operation.backend);
  const double ceiling = std::max(peak > 0 ? operation.cost.flops / peak : 0,
                                  operation.cost.bytes / machine->bandwidth);
  const auto number = [&](double value) { return timed ? json(value) : json(nullptr); };
  json row = {{"op", operation.op},
              {"backend", operation.backend->name},
              {"kernel", operation.kernel},
              {"dtype", name_of(p.dtype)},
              {"layout", one.layout == KvLayout::kPaged ? "paged" : "packed"},
              {"selection", options.selection},
              {"context", setting.context},
              {"new_tokens", setting.new_tokens},
              {"batch", setting.batch},
              {"heads_q", p.heads_q},
              {"heads_kv", p.heads_kv},
              {"head_dim", p.head_dim},
              {"block", p.block_size},
              {"topk", p.topk},
              {"threads", machine->threads.count()},
              {"repeats", one.seconds.size()},
              {"seconds_median", number(seconds.median)},
              {"seconds_p10", number(seconds.p10)},
              {"seconds_p90", number(seconds.p90)},
              {"flops", operation.cost.flops},
              {"bytes", operation.cost.bytes},
              {"tflops", number(operation.cost.flops / seconds.median * 1e-12)},
              {"gbps", number(operation.cost.bytes / seconds.median * 1e-9)},
              {"ceiling_fraction", number(ceiling / seconds.median)},
              {"verdict", one.verdict.ok() ? "ok" : "failed: " + one.verdict.failure},
              {"max_error", one.verdict.max_error},
              {"ratio_to_dense", nullptr}};
  const bool competes = operation.op == "msa" || operation.op.starts_with("sparse_");
  if (timed && competes && dense != nullptr && !dense->seconds.empty()) {
    std::vector<double> ratios;
    for (size_t i = 0; i < one.seconds.size(); ++i)
      ratios.push_back(dense->seconds[i] / one.seconds[i]);
    const Quantiles ratio = quantiles(ratios);
    row["ratio_to_dense"] = {{"median", ratio.median}, {"p10", ratio.p10}, {"p90", ratio.p90}};
  }
  return row;
}

size_t op_width(const Options& options) {
  size_t width = 16;
  for (const std::string& op : options.ops) width = std::max(width, op.size());
  return width;
}

void print_header(const Options& options, Machine* machine) {
  const std::string here =
      machine->device != nullptr
          ? machine->device->machine()["gpu"].get<std::string>()
          : fmt::format("{} | {} threads", cli::machine()["cpu"].get<std::string>(),
                        machine->threads.count());
  fmt::print("{} | {} {} | read bandwidth {:.1f} GB/s\n", here, options.shape, options.dtype,
             machine->bandwidth * 1e-9);
  fmt::print("{:<{}} {:<9} {:>8} {:>7} {:>10} {:>21} {:>8} {:>7} {:>5} {:>8}  {}\n", "op",
             op_width(options), "backend", "context", "new", "median", "p10 to p90", "GFLOP/s",
             "GB/s", "ceil", "error", "verdict");
}

void print_row(const Options& options, const json& row) {
  const auto text = [&](const char* key) { return row[key].get<std::string>(); };
  const auto number = [&](const char* key) {
    return row[key].is_null() ? 0 : row[key].get<double>();
  };
  fmt::print("{:<{}} {:<9} {:>8} {:>7} {:>10} {:>21} {:>8.1f} {:>7.2f} {:>4.0f}% {:>8.1e}  {}",
             text("op"), op_width(options), text("backend"), number("context"),
             number("new_tokens"), human_seconds(number("seconds_median")),
             human_seconds(number("seconds_p10")) + " to " + human_seconds(number("seconds_p90")),
             1e3 * number("tflops"), number("gbps"), 100 * number("ceiling_fraction"),
             number("max_error"), text("verdict"));
  if (const json& ratio = row["ratio_to_dense"]; !ratio.is_null())
    fmt::print("  {:.2f}x dense ({:.2f} to {:.2f})", ratio["median"].get<double>(),
               ratio["p10"].get<double>(), ratio["p90"].get<double>());
  fmt::print("\n");
}

/// A line per row under the keys; of a ratio the median.
std::string tsv_of(const json& rows) {
  const auto cell = [](const json& value) {
    if (value.is_object()) return value["median"].dump();
    return value.is_string() ? value.get<std::string>() : value.dump();
  };
  std::string text;
  for (const auto& [key, value] : rows.front().items()) text += key + '\t';
  for (const json& row : rows) {
    text.back() = '\n';
    for (const auto& [key, value] : row.items()) text += cell(value) + '\t';
  }
  text.back() = '\n';
  return text;
}

Status run_bench(Options options, bool* passed) {
  Setting setting{.backend = options.common.backend, .selection = options.selection};
  MSA_TRY(parse_shape(options.shape, &setting.problem));
  for (const std::string& path : {options.json, options.tsv}) MSA_TRY(check_writable(path));
  Trace trace;
  if (options.selection != "index" && options.selection != "random") {
    MSA_TRY(Trace::open(options.selection, &trace));
    setting.trace = &trace;
  }
  for (int64_t context : options.contexts) {
    if (options.new_tokens > context)
      return bad_input("--new-tokens: got {}, expected at most the context {}", options.new_tokens,
                       context);
    if (context * options.batch > INT32_MAX)
      return bad_input("--context times --batch exceeds 2^31 - 1 tokens");
  }
  std::unique_ptr<CudaTimer> device;
  const Backend* backend = find_backend(options.common.backend);
  const bool on_device = backend != nullptr && backend->device == DeviceKind::kCUDA;
  if (on_device) {
    const Status status = CudaTimer::create(&device);
    if (!status.ok()) return bad_input("backend {}: {}", backend->name, status.message());
  }
  if (options.dtype.empty()) options.dtype = on_device ? "bf16" : "f32";
  setting.problem.dtype = options.dtype == "f32"    ? DType::kF32
                          : options.dtype == "bf16" ? DType::kBF16
                                                    : DType::kF16;
  setting.batch = options.batch;
  const bool decode = options.new_tokens >= 1 && options.new_tokens <= kDecodeTokens;
  if (options.ops.empty())
    options.ops = {"dense_attention", "index_select", "sparse_attention", "msa"};
  if (options.layout.empty()) options.layout = decode ? "paged" : "packed";

  Machine machine(options.common.threads, std::move(device));
  const bool table = !is_stdout(options.json) && !is_stdout(options.tsv);
  json rows = json::array();
  for (int64_t context : options.contexts) {
    setting.context = context;
    setting.new_tokens = options.new_tokens > 0 ? options.new_tokens : context;
    std::map<KvLayout, std::unique_ptr<Workload>> workloads;
    std::vector<Measured> all;
    Progress progress(fmt::format("context {}", context), options.common.quiet);
    for (const std::string& op : options.ops) {
      const uint32_t uses = op == "msa" ? 0 : find_op(op)->uses;
      const bool paged =
          (uses & kPagedOnly) != 0 || (options.layout == "paged" && (uses & kPackedOnly) == 0);
      setting.problem.layout = paged ? KvLayout::kPaged : KvLayout::kPacked;
      auto& workload = workloads[setting.problem.layout];
      if (workload == nullptr)
        workload = std::make_unique<Workload>(setting, machine.threads, machine.device.get());
      Measured one{.layout = setting.problem.layout};
      MSA_TRY(workload->add(op, &one.operation));
      MSA_TRY(workload->poison_outputs());
      Status status;
      one.checked_seconds = seconds_of([&] {
        status = one.operation.run(0);
        if (status.ok() && machine.device != nullptr) status = machine.device->wait();
      });
      MSA_TRY(status);
      MSA_TRY(one.operation.verify(&one.verdict));
      all.push_back(std::move(one));
      progress.update(0, 1);
    }
    MSA_TRY(measure(options, &machine, &all, &progress));
    const auto dense = std::find_if(all.begin(), all.end(), [](const Measured& one) {
      return one.operation.op == "dense_attention";
    });
    for (const Measured& one : all) {
      rows.push_back(
          row_of(options, setting, one, dense == all.end() ? nullptr : &*dense, &machine));
      if (table && rows.size() == 1) print_header(options, &machine);
      if (table) print_row(options, rows.back());
      *passed = *passed && one.verdict.ok();
    }
  }

  json here = cli::machine();
  if (machine.device != nullptr) here.update(machine.device->machine());
  here["read_gbps"] = machine.bandwidth * 1e-9;
  for (const auto& [backend, peak] : machine.peaks) here["peak_gflops"][backend] = peak * 1e-9;
  MSA_TRY(write_json(options.json, {{"machine", here}, {"commit", commit()}, {"rows", rows}}));
  return write_file(options.tsv, tsv_of(rows));
}

}  // namespace

CLI::App* add_bench(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("bench", "Check, then time the operators; FLOPs, bytes, % of the ceiling");
  std::vector<std::string> ops = op_names();
  ops.emplace_back("msa");  // index_select, then sparse attention
  command->add_option("--op", options->ops, "Operators, comma separated; msa = index + attention")
      ->delimiter(',')
      ->transform(current_op_name)
      ->check(CLI::IsMember(ops));
  command->add_option("--shape", options->shape, "m3, code-11m or HQ,HKV,D,BK,K")
      ->capture_default_str();
  command->add_option("--context", options->contexts, "Key lengths, comma separated")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24))
      ->capture_default_str();
  command
      ->add_option("--new-tokens", options->new_tokens,
                   "Query tokens at the end; 1..16 = decode over a paged cache; default all")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  command->add_option("--batch", options->batch, "Sequences")
      ->check(CLI::Range(int64_t{1}, int64_t{65536}))
      ->capture_default_str();
  command->add_option("--dtype", options->dtype, "f32, bf16 or f16; default f32, bf16 on a GPU")
      ->check(CLI::IsMember({"f32", "bf16", "f16"}));
  command->add_option("--layout", options->layout, "packed or paged; default packed, decode paged")
      ->check(CLI::IsMember({"packed", "paged"}));
  command
      ->add_option("--selection", options->selection,
                   "index, random, or FILE: a trace of `msa eval --trace`")
      ->capture_default_str();
  command->add_option("--repeats", options->repeats, "Rounds; default 5 to 100 within 2 s per op")
      ->check(CLI::Range(1, 100000));
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  command->add_option("--tsv", options->tsv, "Write a table to FILE (- = stdout)");
  add_common(command, &options->common);
  command->footer(
      "Examples:\n"
      "  msa bench --op dense_attention,msa --context 8192,32768 --selection trace.safetensors\n"
      "  msa bench --backend cuda --shape m3 --new-tokens 1 --context 131072 --json out.json");
  command->callback([=] { *action = [=](bool* passed) { return run_bench(*options, passed); }; });
  return command;
}

}  // namespace msa::cli
