// msa info: what this build is, what this machine has, which backends work here and why not.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <memory>
#include <ranges>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/op_table.h"
#include "msa/commands.h"
#include "msa/common.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  std::string json;
  std::vector<std::string> problem;  ///< KEY=VALUE
};

// ---- --problem ----------------------------------------------------------------------------------

template <class Number>
Status read_number(const std::string& key, const std::string& value, Number* out) {
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), *out);
  if (error == std::errc() && end == value.data() + value.size()) return {};
  return bad_input("--problem: got {}={}, expected an integer", key, value);
}

/// *out = the one of `choices` that is called `value`.
template <class Enum>
Status read_choice(const std::string& key, const std::string& value,
                   const std::vector<std::pair<const char*, Enum>>& choices, Enum* out) {
  std::string known;
  for (const auto& [name, choice] : choices) {
    if (value == name) {
      *out = choice;
      return {};
    }
    known += (known.empty() ? "" : ", ") + std::string(name);
  }
  return bad_input("--problem: got {}={}, expected one of {}", key, value, known);
}

Status read_problem(const std::vector<std::string>& words, Problem* p, Limits* limits) {
  const std::map<std::string, int32_t*> sizes = {
      {"heads_q", &p->heads_q},         {"heads_kv", &p->heads_kv},
      {"head_dim", &p->head_dim},       {"index_dim", &p->index_dim},
      {"block_size", &p->block_size},   {"topk", &p->topk},
      {"init_blocks", &p->init_blocks}, {"local_blocks", &p->local_blocks}};
  const std::map<std::string, int64_t*> bounds = {{"max_batch", &limits->max_batch},
                                                  {"max_tokens", &limits->max_tokens},
                                                  {"max_seqlen_q", &limits->max_seqlen_q},
                                                  {"max_seqlen_k", &limits->max_seqlen_k}};
  std::vector<std::pair<const char*, Op>> ops;
  for (const OpInfo& op : all_ops()) ops.emplace_back(op.name, op.op);
  for (const std::string& word : words) {
    const size_t equals = word.find('=');
    const std::string key = word.substr(0, equals);
    const std::string value = equals == word.npos ? "" : word.substr(equals + 1);
    if (key == "op") {
      MSA_TRY(read_choice(key, current_op_name(value), ops, &p->op));
    } else if (key == "dtype") {
      MSA_TRY(read_choice(key, value,
                          {{"f32", DType::kF32}, {"bf16", DType::kBF16}, {"f16", DType::kF16}},
                          &p->dtype));
    } else if (key == "layout") {
      MSA_TRY(read_choice(key, value, {{"packed", KvLayout::kPacked}, {"paged", KvLayout::kPaged}},
                          &p->layout));
    } else if (key == "device") {
      MSA_TRY(read_choice(key, value, {{"cpu", DeviceKind::kCPU}, {"cuda", DeviceKind::kCUDA}},
                          &p->device.kind));
    } else if (sizes.contains(key)) {
      MSA_TRY(read_number(key, value, sizes.at(key)));
    } else if (bounds.contains(key)) {
      MSA_TRY(read_number(key, value, bounds.at(key)));
    } else {
      return bad_input(
          "--problem: got {}, expected KEY=VALUE with a KEY of op, dtype, layout, device, {}, {}",
          word, fmt::join(std::views::keys(sizes), ", "),
          fmt::join(std::views::keys(bounds), ", "));
    }
  }
  MSA_TRY(validate(*p));
  return validate(*limits);
}

/// Which kernel each backend of the problem's device takes, and why not a better one.
Status show_kernels(const Options& options) {
  Problem problem;
  Limits limits;
  MSA_TRY(read_problem(options.problem, &problem, &limits));
  const Backend* chosen = nullptr;
  const Status choice = choose_backend(problem, options.common.backend, &chosen);
  nlohmann::ordered_json rows = nlohmann::json::array();
  for (const Backend* backend : backends()) {
    if (backend->device != problem.device.kind) continue;
    const Status usable = backend->usable();
    for (const Kernel& kernel : backend->kernels) {
      if (kernel.op != problem.op) continue;
      const Refusal refusal = kernel.fits != nullptr ? kernel.fits(problem, limits) : Refusal{};
      rows.push_back({{"backend", backend->name},
                      {"kernel", kernel.name},
                      {"fits", !refusal},
                      {"reason", refusal ? refusal.text() : usable.message()},
                      {"usable", usable.ok()},
                      {"chosen", backend == chosen}});
    }
  }
  MSA_TRY(write_json(options.json, {{"kernels", rows}}));
  if (is_stdout(options.json)) return {};
  fmt::print("{}, {}, {}: a call runs on the first kernel that fits and takes its arguments\n\n",
             name_of(problem.op), name_of(problem.dtype),
             problem.layout == KvLayout::kPaged ? "paged" : "packed");
  fmt::print("  {:<14} {:<14} {}\n", "backend", "kernel", "here");
  for (const auto& row : rows) {
    const std::string reason = row["reason"].get<std::string>();
    fmt::print("{} {:<14} {:<14} {}\n", row["chosen"].get<bool>() ? "*" : " ",
               row["backend"].get<std::string>(), row["kernel"].get<std::string>(),
               reason.empty() ? "fits" : "no: " + reason);
  }
  if (choice.ok())
    fmt::print("\n* is what `--backend {}` takes\n", options.common.backend);
  else
    fmt::print("\n{}\n", choice.message());
  return {};
}

/// The vector extensions that backends ask for, of those the CPU names.
std::vector<std::string> isa_features() {
  std::ifstream in("/proc/cpuinfo");
  std::vector<std::string> found;
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    for (std::string word; words >> word;) {
      for (const char* wanted :
           {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
            "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8", "asimd", "sve"})
        if (word == wanted) found.push_back(word);
    }
    break;  // the other cores say the same
  }
  return found;
}

Status run_info(const Options& options) {
  MSA_TRY(check_writable(options.json));
  if (!options.problem.empty()) return show_kernels(options);
  const nlohmann::ordered_json here = machine();
  nlohmann::ordered_json info = {{"version", MSA_VERSION_STRING},
                                 {"commit", commit()},
                                 {"cuda", find_backend("cuda") != nullptr},
                                 {"machine", here},
                                 {"isa", isa_features()},
                                 {"backends", nlohmann::json::array()}};
  const Backend* chosen = nullptr;
  MSA_TRY(choose_backend(Problem{}, options.common.backend, &chosen));
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    info["backends"].push_back({{"name", backend->name},
                                {"requirement", backend->requirement},
                                {"priority", backend->priority},
                                {"usable", usable.ok()},
                                {"reason", usable.message()},
                                {"chosen", backend == chosen}});
  }
  MSA_TRY(write_json(options.json, info));
  if (is_stdout(options.json)) return {};

  fmt::print("msa {} (commit {}, {} build, {}, {} CUDA)\n", MSA_VERSION_STRING, commit(),
             here["build"].get<std::string>(), here["compiler"].get<std::string>(),
             info["cuda"].get<bool>() ? "with" : "without");
  fmt::print("{}, {} cores, {} GiB, {}\n", here["cpu"].get<std::string>(), here["cores"].dump(),
             here["memory_gib"].dump(), here["os"].get<std::string>());
  fmt::print("vector extensions: {}\n\n", fmt::join(isa_features(), " "));
  size_t width = 0;
  for (const Backend* backend : backends())
    width = std::max(width, std::string_view(backend->requirement).size());
  fmt::print("  {:<14} {:>8}  {:<{}}  {}\n", "backend", "priority", "needs", width, "here");
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    fmt::print("{} {:<14} {:>8}  {:<{}}  {}\n", backend == chosen ? "*" : " ", backend->name,
               backend->priority, backend->requirement, width,
               usable.ok() ? "usable" : "no: " + usable.message());
  }
  fmt::print("\n* is what `--backend {}` takes for the shape of MiniMax-M3\n",
             options.common.backend);
  return {};
}

}  // namespace

CLI::App* add_info(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("info", "Version, build, machine, backends and why each is usable or not");
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  command
      ->add_option(
          "--problem", options->problem,
          "The kernels for a problem instead: op=sparse_attention,dtype=bf16,... (fields of "
          "msa::Problem, device=cpu|cuda, max_batch, max_tokens, max_seqlen_q, max_seqlen_k)")
      ->delimiter(',');
  add_common(command, &options->common);
  command->footer(
      "Examples:\n  msa info --json -\n"
      "  msa info --problem op=sparse_attention,dtype=bf16,layout=paged,device=cuda");
  command->callback([=] { *action = [=](bool*) { return run_info(*options); }; });
  return command;
}

}  // namespace msa::cli
