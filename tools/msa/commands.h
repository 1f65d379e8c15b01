// The subcommands: one file each. add_NAME registers the command with its flags; when the user
// chooses it, *action becomes what main() runs.
//
//   CLI::App* add_info(CLI::App& app, Action* action) {
//     auto options = std::make_shared<Options>();
//     CLI::App* command = app.add_subcommand("info", "Version, build, machine, backends");
//     command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
//     add_common(command, &options->common);
//     command->callback([=] { *action = [=](bool*) { return run_info(*options); }; });
//     return command;
//   }
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

#include "msa/status.h"

namespace msa::cli {

/// An error is one line on stderr and exit code 2, 1 for a result that is no number; *passed, true
/// before, becomes false where a check failed and the command has said so: exit code 1.
using Action = std::function<Status(bool* passed)>;

CLI::App* add_eval(CLI::App& app, Action* action);
CLI::App* add_generate(CLI::App& app, Action* action);
CLI::App* add_attend(CLI::App& app, Action* action);
CLI::App* add_inspect(CLI::App& app, Action* action);
CLI::App* add_check(CLI::App& app, Action* action);
CLI::App* add_bench(CLI::App& app, Action* action);
CLI::App* add_info(CLI::App& app, Action* action);

}  // namespace msa::cli
