// msa eval: dense attention against MSA on a real text: bits per byte, seconds, mass kept.
#include <fmt/format.h>
#include <sys/resource.h>

#include <cmath>
#include <memory>
#include <numbers>
#include <numeric>
#include <optional>

#include "model/safetensors.h"
#include "msa/commands.h"
#include "msa/model_flags.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  ModelFlags model;
  InputFlags input;
  std::string attention = "both", trace, json;
};

struct Result {
  double bits_per_byte = 0;
  model::Timings seconds;
  std::vector<double> kept_mass;
};

struct Report {
  std::unique_ptr<model::Model> model;
  int64_t context = 0;
  std::optional<Result> dense, msa;
};

double sum(const std::vector<double>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0);
}

double sum_sparse(const std::vector<double>& per_layer, const model::Config& config) {
  double total = 0;
  for (size_t i = 0; i < per_layer.size(); ++i)
    if (config.layers[i].sparse) total += per_layer[i];
  return total;
}

/// Block ids of the sparse layers, gathered chunk by chunk into [Hi,T,K] for a file.
class Trace {
 public:
  Trace(const model::Config& config, int64_t tokens) : config_(config), tokens_(tokens) {
    for (const model::LayerConfig& layer : config.layers)
      ids_.emplace_back(layer.sparse ? size(config.heads_kv * tokens * config.topk) : 0);
  }

  void add(int layer, int64_t first, const TensorView& ids) {
    for (int64_t head = 0; head < ids.shape[0]; ++head)
      std::copy_n(ids.at<const int32_t>(head), ids.shape[1] * ids.shape[2],
                  ids_[size(layer)].data() + (head * tokens_ + first) * config_.topk);
  }

  Status write(const std::string& path) const {
    std::vector<std::pair<std::string, TensorView>> tensors;
    for (size_t i = 0; i < ids_.size(); ++i)
      if (!ids_[i].empty())
        tensors.emplace_back(fmt::format("layers.{}.block_ids", i),
                             TensorView::contiguous(ids_[i].data(), DType::kI32,
                                                    {config_.heads_kv, tokens_, config_.topk}));
    const model::Metadata metadata{{"block_size", std::to_string(config_.block_size)},
                                   {"context", std::to_string(tokens_)},
                                   {"topk", std::to_string(config_.topk)}};
    return write_atomically(
        path, [&](std::FILE* file) { return model::write_safetensors(file, tensors, metadata); });
  }

 private:
  static size_t size(int64_t value) { return static_cast<size_t>(value); }
  const model::Config& config_;
  int64_t tokens_;
  std::vector<std::vector<int32_t>> ids_;  ///< per layer, empty without selection
};

Status run_attention(const model::Model& model, model::Attention attention,
                     std::span<const int32_t> tokens, bool quiet, Trace* trace, Result* out) {
  std::unique_ptr<model::Session> session;
  MSA_TRY(model::Session::create(model, attention, static_cast<int64_t>(tokens.size()), &session));
  const bool is_msa = attention == model::Attention::kMsa;
  Progress progress(is_msa ? "MSA  " : "dense", quiet);
  double nats = 0;
  model::Hooks hooks = shown_by(&progress);
  hooks.kept_mass = hooks.time_index = is_msa;
  hooks.on_loss = [&](int64_t, std::span<const float> losses) {
    for (float loss : losses) nats += static_cast<double>(loss);
  };
  if (trace != nullptr)
    hooks.on_selection = [&](int layer, int64_t first, const TensorView& ids) {
      trace->add(layer, first, ids);
    };
  MSA_TRY(session->extend(tokens, {}, hooks));
  out->bits_per_byte = nats / static_cast<double>(tokens.size() - 1) / std::numbers::ln2;
  out->seconds = session->timings();
  out->kept_mass = session->kept_mass();
  return {};
}

Status evaluate(const Options& options, Report* report) {
  for (const std::string& path : {options.json, options.trace}) MSA_TRY(check_writable(path));
  const bool wants_dense = options.attention != "msa", wants_msa = options.attention != "dense";
  if (!options.trace.empty() && !wants_msa)
    return bad_input("--trace: dense attention selects no blocks; use --attention msa or both");
  MSA_TRY(load_model(options.model, options.common, &report->model));
  const model::Model& model = *report->model;
  if (wants_msa && model.config().sparse_layers() == 0)
    return bad_input("the model has no sparse layers; use --attention dense");
  std::vector<int32_t> tokens;
  MSA_TRY(load_input(model.config(), options.input, &tokens));
  report->context = std::ssize(tokens);

  const bool quiet = options.common.quiet;
  if (wants_dense)
    MSA_TRY(run_attention(model, model::Attention::kDense, tokens, quiet, nullptr,
                          &report->dense.emplace()));
  std::optional<Trace> trace;
  if (!options.trace.empty()) trace.emplace(model.config(), report->context);
  if (wants_msa)
    MSA_TRY(run_attention(model, model::Attention::kMsa, tokens, quiet, trace ? &*trace : nullptr,
                          &report->msa.emplace()));
  return trace ? trace->write(options.trace) : Status();
}

nlohmann::ordered_json to_json(const char* name, const Result& result) {
  nlohmann::ordered_json mass;
  if (!result.kept_mass.empty()) mass = result.kept_mass;
  return {{"attention", name},
          {"bits_per_byte", result.bits_per_byte},
          {"prefill_seconds", result.seconds.total},
          {"attention_seconds", sum(result.seconds.attention)},
          {"index_seconds", sum(result.seconds.index)},
          {"kept_mass", mass},
          {"attention_seconds_per_layer", result.seconds.attention},
          {"index_seconds_per_layer", result.seconds.index}};
}

int64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

nlohmann::ordered_json to_json(const Options& options, const Report& report) {
  const model::Config& config = report.model->config();
  nlohmann::ordered_json json = {{"context", report.context},
                                 {"tokens", report.context - 1},
                                 {"results", nlohmann::ordered_json::array()},
                                 {"speedup_attention", nullptr},
                                 {"speedup_sparse_layers", nullptr},
                                 {"backend", report.model->backend_name()},
                                 {"threads", report.model->threads()},
                                 {"model", options.model.directory},
                                 {"dtype", name_of(report.model->dtype())},
                                 {"topk", config.topk},
                                 {"peak_rss_bytes", peak_rss_bytes()}};
  if (report.dense) json["results"].push_back(to_json("dense", *report.dense));
  if (report.msa) json["results"].push_back(to_json("msa", *report.msa));
  if (report.dense && report.msa) {
    const auto& dense = report.dense->seconds.attention;
    const auto& msa = report.msa->seconds.attention;
    json["speedup_attention"] = sum(dense) / sum(msa);
    json["speedup_sparse_layers"] = sum_sparse(dense, config) / sum_sparse(msa, config);
  }
  return json;
}

void print_row(const char* name, const Result& result) {
  std::string index, mass;  // blank where there is none
  if (const double seconds = sum(result.seconds.index); seconds > 0) index = human_seconds(seconds);
  if (const auto layers = static_cast<double>(result.kept_mass.size()); layers > 0)
    mass = fmt::format("{:.3f}", sum(result.kept_mass) / layers);
  fmt::print("  {:<10} {:>10.4f} {:>12} {:>12} {:>12} {:>10}\n", name, result.bits_per_byte,
             human_seconds(result.seconds.total), human_seconds(sum(result.seconds.attention)),
             index, mass);
}

void print_table(const Options& options, const Report& report, const nlohmann::ordered_json& json) {
  const model::Config& config = report.model->config();
  fmt::print("{}: {} layers, {} of them sparse (top {} blocks of {} tokens)\n",
             options.model.directory, config.layers.size(), config.sparse_layers(), config.topk,
             config.block_size);
  fmt::print("{} tokens of {}, {} on {} with {} threads\n\n", report.context, options.input.path(),
             name_of(report.model->dtype()), report.model->backend_name(), report.model->threads());
  fmt::print("  {:<10} {:>10} {:>12} {:>12} {:>12} {:>10}\n", "attention",
             options.input.text.empty() ? "bits/token" : "bits/byte", "prefill", "attention",
             "of it index", "kept mass");
  if (report.dense) print_row("dense", *report.dense);
  if (report.msa) print_row("MSA", *report.msa);
  fmt::print("\n");
  if (report.dense && report.msa)
    fmt::print("  attention {:.2f}x faster with MSA, {:.2f}x in the sparse layers\n",
               json["speedup_attention"].get<double>(),
               json["speedup_sparse_layers"].get<double>());
  if (report.msa && !report.msa->kept_mass.empty()) {
    std::vector<std::string> parts;
    for (size_t i = 0; i < config.layers.size(); ++i)
      if (config.layers[i].sparse)
        parts.push_back(fmt::format("{}: {:.3f}", i, report.msa->kept_mass[parts.size()]));
    fmt::print("  attention mass kept in layer {}\n", fmt::join(parts, ", "));
  }
  fmt::print("  peak memory {} MiB\n", json["peak_rss_bytes"].get<int64_t>() >> 20);
}

Status run_eval(const Options& options) {
  Report report;
  MSA_TRY(evaluate(options, &report));
  const nlohmann::ordered_json json = to_json(options, report);
  MSA_TRY(write_json(options.json, json));
  if (!is_stdout(options.json)) print_table(options, report, json);
  return {};
}

}  // namespace

CLI::App* add_eval(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("eval", "Bits per byte and time of dense attention and of MSA on a text");
  add_model_flags(command, &options->model);
  add_input_flags(command, &options->input, int64_t{1} << 30);
  command->add_option("--attention", options->attention, "dense, msa or both")
      ->check(CLI::IsMember({"dense", "msa", "both"}));
  command->add_option("--topk", options->model.topk, "Blocks per query (default: the model's)")
      ->check(CLI::Range(1, 1 << 16));
  command->add_option("--trace", options->trace, "Write the block ids of the sparse layers");
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  add_common(command, &options->common);
  command->footer(
      "Example:\n"
      "  msa eval --model models/code-11m --text models/code-11m/sample.txt --context 16384");
  command->callback([=] { *action = [=](bool*) { return run_eval(*options); }; });
  return command;
}

}  // namespace msa::cli
