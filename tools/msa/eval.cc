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

constexpr int64_t kDefaultContext = 16384;

struct Options {
  Common common;
  ModelFlags model;
  std::string text, token_ids, attention = "both", trace, json;
  int64_t context = 0;  ///< 0 = the file, at most kDefaultContext
};

struct Result {
  double bits_per_byte = 0;
  model::Timings seconds;
  std::vector<double> kept_mass;
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
    return write_atomically(path, [&](const std::filesystem::path& temporary) {
      return model::write_safetensors(temporary, tensors, metadata);
    });
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
  model::Hooks hooks;
  hooks.kept_mass = is_msa;
  hooks.on_loss = [&](int64_t, std::span<const float> losses) {
    for (float loss : losses) nats += static_cast<double>(loss);
  };
  hooks.on_progress = [&](int64_t done, int64_t total) {
    progress.update(done, total);
    return true;
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

nlohmann::json to_json(const char* name, const Result& result) {
  return {
      {"attention", name},
      {"bits_per_byte", result.bits_per_byte},
      {"prefill_seconds", result.seconds.total},
      {"attention_seconds", sum(result.seconds.attention)},
      {"index_seconds", sum(result.seconds.index)},
      {"kept_mass", result.kept_mass.empty() ? nlohmann::json() : nlohmann::json(result.kept_mass)},
      {"attention_seconds_per_layer", result.seconds.attention},
      {"index_seconds_per_layer", result.seconds.index}};
}

void print_row(const char* name, const Result& result) {
  const double mass = result.kept_mass.empty()
                          ? 0
                          : sum(result.kept_mass) / static_cast<double>(result.kept_mass.size());
  fmt::print("  {:<10} {:>10.4f} {:>12} {:>12} {:>12} {:>10}\n", name, result.bits_per_byte,
             human_seconds(result.seconds.total), human_seconds(sum(result.seconds.attention)),
             human_seconds(sum(result.seconds.index)),
             result.kept_mass.empty() ? "" : fmt::format("{:.3f}", mass));
}

int64_t peak_rss_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

int run_eval(const Options& options) {
  for (const std::string& path : {options.json, options.trace})
    if (const Status status = check_writable(path); !status.ok()) return fail(status);
  const bool wants_dense = options.attention != "msa", wants_msa = options.attention != "dense";
  if (!options.trace.empty() && !wants_msa)
    return fail("--trace: dense attention selects no blocks; use --attention msa or both");

  std::unique_ptr<model::Model> model;
  if (const Status status = load_model(options.model, options.common, &model); !status.ok())
    return fail(status);
  const model::Config& config = model->config();
  if (wants_msa && config.sparse_layers() == 0)
    return fail("the model has no sparse layers; use --attention dense");

  std::vector<int32_t> tokens;
  const int64_t limit = options.context > 0 ? options.context : kDefaultContext;
  const Status loaded = load_tokens(config, options.text, options.token_ids, limit, &tokens);
  if (!loaded.ok()) return fail(loaded);
  const std::string& source = options.text.empty() ? options.token_ids : options.text;
  const auto context = static_cast<int64_t>(tokens.size());
  if (context < 2)
    return fail(fmt::format("{}: got {} tokens, scoring needs at least 2", source, context));
  if (context < options.context)
    return fail(
        fmt::format("--context: got {}, but {} holds {} tokens", options.context, source, context));

  const bool quiet = options.common.quiet;
  Result dense, msa;
  std::optional<Trace> trace;
  if (!options.trace.empty()) trace.emplace(config, context);
  if (wants_dense) {
    const Status status =
        run_attention(*model, model::Attention::kDense, tokens, quiet, nullptr, &dense);
    if (!status.ok()) return fail(status);
  }
  if (wants_msa) {
    const Status status = run_attention(*model, model::Attention::kMsa, tokens, quiet,
                                        trace ? &*trace : nullptr, &msa);
    if (!status.ok()) return fail(status);
  }

  nlohmann::json json = {{"context", context},
                         {"tokens", context - 1},
                         {"results", nlohmann::json::array()},
                         {"speedup_attention", nullptr},
                         {"speedup_sparse_layers", nullptr},
                         {"backend", model->backend_name()},
                         {"threads", model->threads()},
                         {"model", options.model.directory},
                         {"dtype", options.model.dtype},
                         {"topk", config.topk},
                         {"peak_rss_bytes", peak_rss_bytes()}};
  if (wants_dense) json["results"].push_back(to_json("dense", dense));
  if (wants_msa) json["results"].push_back(to_json("msa", msa));
  if (wants_dense && wants_msa) {
    json["speedup_attention"] = sum(dense.seconds.attention) / sum(msa.seconds.attention);
    json["speedup_sparse_layers"] =
        sum_sparse(dense.seconds.attention, config) / sum_sparse(msa.seconds.attention, config);
  }
  if (trace)
    if (const Status status = trace->write(options.trace); !status.ok()) return fail(status);
  if (const Status status = write_json(options.json, json); !status.ok()) return fail(status);
  if (options.json == "-") return kOk;

  fmt::print("{}, {} tokens of {}\n", options.model.directory, context, source);
  fmt::print("{} layers ({} sparse), backend {}, {} threads, {}, top {} blocks of {} tokens\n\n",
             config.layers.size(), config.sparse_layers(), model->backend_name(), model->threads(),
             options.model.dtype, config.topk, config.block_size);
  fmt::print("  {:<10} {:>10} {:>12} {:>12} {:>12} {:>10}\n", "attention", "bits/byte", "prefill",
             "attention", "of it index", "kept mass");
  if (wants_dense) print_row("dense", dense);
  if (wants_msa) print_row("MSA", msa);
  if (wants_dense && wants_msa)
    fmt::print("\n  MSA is {:.2f}x faster in attention, {:.2f}x in its sparse layers\n",
               json["speedup_attention"].get<double>(),
               json["speedup_sparse_layers"].get<double>());
  if (!msa.kept_mass.empty()) {
    fmt::print("  attention mass kept by layer:");
    size_t next = 0;
    for (size_t i = 0; i < config.layers.size(); ++i)
      if (config.layers[i].sparse) fmt::print("  {}: {:.3f}", i, msa.kept_mass[next++]);
    fmt::print("\n");
  }
  return kOk;
}

}  // namespace

CLI::App* add_eval(CLI::App& app, std::function<int()>* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("eval", "Bits per byte and time of dense attention and of MSA on a text");
  add_model_flags(command, &options->model);
  CLI::Option_group* input = command->add_option_group("Input", "One of these:");
  input->add_option("--text", options->text, "Text, read as bytes");
  input->add_option("--token-ids", options->token_ids, "Ids: int32 .npy or safetensors");
  input->require_option(1);
  command->add_option("--context", options->context, "Tokens to score (default: up to 16384)")
      ->check(CLI::Range(int64_t{2}, int64_t{1} << 30));
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
  command->callback([=] { *action = [=] { return run_eval(*options); }; });
  return command;
}

}  // namespace msa::cli
