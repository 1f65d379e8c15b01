// msa inspect: runs a text through a model and draws which blocks the queries of a layer read.
#include <fmt/format.h>

#include <algorithm>
#include <memory>

#include "msa/commands.h"
#include "msa/model_flags.h"
#include "msa/picture.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  ModelFlags model;
  InputFlags input;
  std::string output;
  int layer = 0;
};

std::string sparse_layers(const model::Config& config) {
  std::string names;
  for (size_t layer = 0; layer < config.layers.size(); ++layer)
    if (config.layers[layer].sparse) names += (names.empty() ? "" : ", ") + std::to_string(layer);
  return names.empty() ? "none" : names;
}

Status select(const Options& options, Selection* selection) {
  MSA_TRY(check_writable(options.output));
  std::unique_ptr<model::Model> loaded;
  MSA_TRY(load_model(options.model, options.common, &loaded));
  const model::Config& config = loaded->config();
  if (options.layer >= static_cast<int>(config.layers.size()) ||
      !config.layers[static_cast<size_t>(options.layer)].sparse)
    return bad_input("--layer: got {}, expected a sparse layer: {}", options.layer,
                     sparse_layers(config));
  std::vector<int32_t> tokens;
  MSA_TRY(load_input(config, options.input, &tokens));
  if (options.input.token_ids.empty()) selection->text.assign(tokens.begin(), tokens.end());
  selection->tokens = static_cast<int64_t>(tokens.size());
  selection->heads = config.heads_kv;
  selection->block = config.block_size;
  selection->topk = config.topk;
  selection->ids.assign(static_cast<size_t>(config.heads_kv * selection->tokens * config.topk), -1);

  std::unique_ptr<model::Session> session;
  MSA_TRY(model::Session::create(*loaded, model::Attention::kMsa, selection->tokens, &session));
  Progress progress("reading", options.common.quiet);
  model::Hooks hooks = shown_by(&progress);
  hooks.kept_mass = true;
  hooks.on_selection = [&](int layer, int64_t first, const TensorView& ids) {
    if (layer != options.layer) return;
    for (int64_t head = 0; head < ids.shape[0]; ++head)
      for (int64_t t = 0; t < ids.shape[1]; ++t)
        std::copy_n(
            ids.at<const int32_t>(head, t), ids.shape[2],
            selection->ids.begin() + (head * selection->tokens + first + t) * selection->topk);
  };
  MSA_TRY(session->extend(tokens, {}, hooks));

  const auto sparse_before =
      std::count_if(config.layers.begin(), config.layers.begin() + options.layer,
                    [](const auto& layer) { return layer.sparse; });
  const std::vector<double> kept = session->kept_mass();
  selection->title = "Which blocks each query reads";
  selection->subtitle = fmt::format(
      "{} · layer {} · {} tokens · blocks of {} · {} blocks per query{}",
      std::filesystem::weakly_canonical(options.model.directory).filename().string(), options.layer,
      fmt::group_digits(selection->tokens), selection->block, selection->topk,
      kept.size() <= static_cast<size_t>(sparse_before)
          ? ""
          : fmt::format(" · {:.1f} % of the attention mass kept",
                        100 * kept[static_cast<size_t>(sparse_before)]));
  return {};
}

Status run_inspect(const Options& options) {
  const std::string kind = std::filesystem::path(options.output).extension().string();
  if (kind != ".svg" && kind != ".html")
    return bad_input("--output: got {}, expected a name in .svg or .html", options.output);
  Selection selection;
  MSA_TRY(select(options, &selection));
  MSA_TRY(write_file(options.output, kind == ".svg" ? draw_svg(selection) : draw_html(selection)));
  fmt::print("{} -> {}\n", selection.subtitle, options.output);
  for (int64_t index = 0; index < selection.heads; ++index) {
    const HeadStatistics head = statistics(selection, index);
    fmt::print(
        "KV head {}: queries per block p10 {:.0f}, p50 {:.0f}, p90 {:.0f}; union of "
        "2, 4, 8, 16, 32 neighbours {:.2f} lists\n",
        index, head.p10, head.p50, head.p90, fmt::join(head.overlap, ", "));
  }
  return {};
}

}  // namespace

CLI::App* add_inspect(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("inspect", "Draw which blocks the queries of a layer read");
  add_model_flags(command, &options->model);
  add_input_flags(command, &options->input, int64_t{1} << 20);
  command->add_option("--layer", options->layer, "A sparse layer, counted from 0")
      ->required()
      ->check(CLI::Range(0, 100000));
  command->add_option("--topk", options->model.topk, "Blocks per query; default the checkpoint's")
      ->check(CLI::Range(1, 1 << 20));
  command->add_option("--output", options->output, "map.svg, or map.html with tooltips")
      ->required();
  add_common(command, &options->common);
  command->footer(
      "Example:\n  msa inspect --model models/code-11m --text models/code-11m/sample.txt "
      "--layer 3 --context 32768 --output map.svg");
  command->callback([=] { *action = [=](bool*) { return run_inspect(*options); }; });
  return command;
}

}  // namespace msa::cli
