// msa check: every backend against the reference, on the generated cases of src/conformance.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <thread>
#include <vector>

#include "conformance/harness.h"
#include "msa/commands.h"
#include "msa/common.h"

namespace msa::cli {
namespace {

using conformance::Outcome;

struct Options {
  Common common;
  std::string suite = "smoke";
  std::vector<std::string> ops;  ///< empty = all
  std::string json;
};

/// What one backend did in all cases.
struct Tally {
  std::array<int, 3> count{};              ///< by Outcome
  std::map<std::string, int> skipped_for;  ///< reason -> cases
  double max_error = 0;
  double seconds = 0;
};

int count_of(const Tally& tally, Outcome outcome) {
  return tally.count[static_cast<size_t>(outcome)];
}

const char* name_of(Outcome outcome) {
  constexpr std::array names = {"passed", "failed", "skipped"};
  return names[static_cast<size_t>(outcome)];
}

/// The named backend, or all that this machine can run; a machine without a device says nothing
/// about a CUDA backend, which is then left out.
Status choose_backends(const std::string& name, std::vector<const Backend*>* out) {
  if (name != "auto") {
    if (find_backend(name) == nullptr) {
      std::string known = "auto";
      for (const Backend* backend : backends()) known += fmt::format(", {}", backend->name);
      return bad_input("--backend: got \"{}\", expected {}", name, known);
    }
    const Backend& backend = *find_backend(name);
    const Status usable = backend.usable();
    if (!usable.ok() && backend.device == DeviceKind::kCPU)
      return {usable.code(), fmt::format("backend {}: {}", name, usable.message())};
  }
  for (const Backend* backend : backends()) {
    if (backend->usable().ok() && (name == "auto" || name == backend->name))
      out->push_back(backend);
  }
  return {};
}

int worker_count(int asked) {
  // More workers than cores still find what depends on their number.
  return asked > 0 ? asked : std::max(4, static_cast<int>(std::thread::hardware_concurrency()));
}

void print_tally(const Backend& backend, const Tally& tally) {
  fmt::print("{:<14} {:>5} passed, {} failed, {} skipped; largest error {:.1e}, {}\n", backend.name,
             count_of(tally, Outcome::kPassed), count_of(tally, Outcome::kFailed),
             count_of(tally, Outcome::kSkipped), tally.max_error, human_seconds(tally.seconds));
  for (const auto& [reason, cases] : tally.skipped_for)
    fmt::print("  skipped {:>4}: {}\n", cases, reason);
}

Status run_check(const Options& options, bool* passed) {
  MSA_TRY(check_writable(options.json));
  std::vector<const Backend*> chosen;
  MSA_TRY(choose_backends(options.common.backend, &chosen));

  std::vector<conformance::Case> cases;
  if (!chosen.empty())
    cases = conformance::make_cases(options.suite == "full" ? conformance::Suite::kFull
                                                            : conformance::Suite::kSmoke);
  std::erase_if(cases, [&](const conformance::Case& c) {
    return !options.ops.empty() && std::ranges::count(options.ops, msa::name_of(c.problem.op)) == 0;
  });
  conformance::Harness harness(worker_count(options.common.threads));
  std::map<const Backend*, Tally> tallies;
  std::array<int, 3> total{};
  nlohmann::json rows = nlohmann::json::array();
  std::vector<std::string> failures;
  {
    Progress progress("check", options.common.quiet);
    for (size_t i = 0; i < cases.size(); ++i) {
      for (const conformance::Result& result : harness.run(cases[i], chosen)) {
        Tally& tally = tallies[result.backend];
        ++tally.count[static_cast<size_t>(result.outcome)];
        ++total[static_cast<size_t>(result.outcome)];
        tally.max_error = std::max(tally.max_error, result.max_error);
        tally.seconds += result.seconds;
        const char* op = msa::name_of(cases[i].problem.op);
        if (result.outcome == Outcome::kSkipped) ++tally.skipped_for[result.detail];
        if (result.outcome == Outcome::kFailed)
          failures.push_back(fmt::format("FAILED {} {}/{}\n  {}", result.backend->name, op,
                                         cases[i].name, result.detail));
        rows.push_back({{"backend", result.backend->name},
                        {"op", op},
                        {"name", cases[i].name},
                        {"status", name_of(result.outcome)},
                        {"max_error", result.max_error}});
        if (!result.detail.empty()) rows.back()["detail"] = result.detail;
      }
      progress.update(static_cast<int64_t>(i + 1), static_cast<int64_t>(cases.size()));
    }
  }

  const nlohmann::json report = {
      {"passed", total[0]}, {"failed", total[1]}, {"skipped", total[2]}, {"cases", rows}};
  MSA_TRY(write_json(options.json, report));
  *passed = total[1] == 0;
  if (is_stdout(options.json)) return {};

  for (const std::string& failure : failures) fmt::print("{}\n", failure);
  for (const Backend* backend : backends()) {
    const Status usable = backend->usable();
    if (tallies.contains(backend))
      print_tally(*backend, tallies[backend]);
    else if (!usable.ok())
      fmt::print("{:<14} {}: {}\n", backend->name,
                 backend->device == DeviceKind::kCPU ? "not usable" : "skipped", usable.message());
  }
  fmt::print("{} passed, {} failed, {} skipped\n", total[0], total[1], total[2]);
  return {};
}

}  // namespace

CLI::App* add_check(CLI::App& app, Action* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("check", "Every backend against the reference");
  command
      ->add_option("--suite", options->suite,
                   "smoke (about 360 cases per backend) or full (about 3,300)")
      ->check(CLI::IsMember({"smoke", "full"}))
      ->capture_default_str();
  command->add_option("--op", options->ops, "Operators, comma separated; default all")
      ->delimiter(',')
      ->transform(current_op_name)
      ->check(CLI::IsMember(op_names()));
  command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
  add_common(command, &options->common);
  command->footer(
      "Example:\n  msa check --backend avx2 --op index_select,sparse_attention --suite full");
  command->callback([=] { *action = [=](bool* passed) { return run_check(*options, passed); }; });
  return command;
}

}  // namespace msa::cli
