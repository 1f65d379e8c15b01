// msa info: what this build is, what this machine has, which backends work here and why not.
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <sstream>
#include <string_view>

#include "msa/commands.h"
#include "msa/common.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  std::string json;
};

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

int run_info(const Options& options) {
  if (const Status status = check_writable(options.json); !status.ok()) return fail(status);
  const nlohmann::ordered_json here = machine();
  nlohmann::ordered_json info = {{"version", MSA_VERSION_STRING},
                                 {"commit", commit()},
                                 {"cuda", find_backend("cuda") != nullptr},
                                 {"machine", here},
                                 {"isa", isa_features()},
                                 {"backends", nlohmann::json::array()}};
  const Backend* chosen = nullptr;
  const Status choice = choose_backend(Problem{}, options.common.backend, &chosen);
  if (!choice.ok()) return fail(choice);
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    info["backends"].push_back({{"name", backend->name()},
                                {"requirement", backend->requirement()},
                                {"priority", backend->priority()},
                                {"usable", usable.ok()},
                                {"reason", usable.message()},
                                {"chosen", backend == chosen}});
  }
  if (!options.json.empty()) {
    const Status status = write_json(options.json, info);
    if (!status.ok()) return fail(status);
    if (is_stdout(options.json)) return kOk;
  }

  fmt::print("msa {} (commit {}, {} build, {}, {} CUDA)\n", MSA_VERSION_STRING, commit(),
             here["build"].get<std::string>(), here["compiler"].get<std::string>(),
             info["cuda"].get<bool>() ? "with" : "without");
  fmt::print("{}, {} cores, {} GiB, {}\n", here["cpu"].get<std::string>(), here["cores"].dump(),
             here["memory_gib"].dump(), here["os"].get<std::string>());
  fmt::print("vector extensions: {}\n\n", fmt::join(isa_features(), " "));
  size_t width = 0;
  for (const Backend* backend : backends())
    width = std::max(width, std::string_view(backend->requirement()).size());
  fmt::print("  {:<14} {:>8}  {:<{}}  {}\n", "backend", "priority", "needs", width, "here");
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    fmt::print("{} {:<14} {:>8}  {:<{}}  {}\n", backend == chosen ? "*" : " ", backend->name(),
               backend->priority(), backend->requirement(), width,
               usable.ok() ? "usable" : "no: " + usable.message());
  }
  fmt::print("\n* is what `--backend {}` takes for the shape of MiniMax-M3\n",
             options.common.backend);
  return kOk;
}

}  // namespace

CLI::App* add_info(CLI::App& app, std::function<int()>* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("info", "Version, build, machine, backends and why each is usable or not");
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  add_common(command, &options->common);
  command->footer("Example:\n  msa info --json -");
  command->callback([=] { *action = [=] { return run_info(*options); }; });
  return command;
}

}  // namespace msa::cli
