// The subcommands: one file each. add_NAME registers the command with its flags; when the user
// chooses it, *action becomes what main() runs. An action returns the exit code:
// 0 ok, 1 a check failed or a result that is no number, 2 bad input.
//
//   CLI::App* add_info(CLI::App& app, std::function<int()>* action) {
//     auto options = std::make_shared<Options>();
//     CLI::App* command = app.add_subcommand("info", "Version, build, machine, backends");
//     command->add_option("--json", options->json, "Write JSON to FILE (- = stdout)");
//     add_common(command, &options->common);
//     command->callback([=] { *action = [=] { return run_info(*options); }; });
//     return command;
//   }
#pragma once

#include <CLI/CLI.hpp>
#include <functional>

namespace msa::cli {

CLI::App* add_eval(CLI::App& app, std::function<int()>* action);
CLI::App* add_generate(CLI::App& app, std::function<int()>* action);
CLI::App* add_attend(CLI::App& app, std::function<int()>* action);
CLI::App* add_inspect(CLI::App& app, std::function<int()>* action);
CLI::App* add_check(CLI::App& app, std::function<int()>* action);
CLI::App* add_bench(CLI::App& app, std::function<int()>* action);
CLI::App* add_info(CLI::App& app, std::function<int()>* action);

}  // namespace msa::cli
