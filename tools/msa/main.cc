// The command `msa`: parses, runs one subcommand, returns its exit code.
#include <fmt/format.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "msa/commands.h"
#include "msa/common.h"

/// Options as `--name VALUE`: the ranges and choices that a value is checked for stay out.
class HelpFormat : public CLI::Formatter {
  std::string make_option_opts(const CLI::Option* option) const override {
    if (option->get_type_size() == 0) return "";
    const std::string type = option->get_type_name();
    const size_t choices = type.find('{');
    std::string text =
        " " + (choices == type.npos ? type.substr(0, type.find(':')) : type.substr(choices));
    if (!option->get_default_str().empty()) text += " (" + option->get_default_str() + ")";
    if (option->get_required()) text += " (required)";
    return text;
  }
};

std::vector<std::string> names_of(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) names.push_back(command->get_name());
  return names;
}

int main(int argc, char** argv) {
  using namespace msa::cli;
  using msa::Status;
  install_signal_handlers();

  CLI::App app("MiniMax Sparse Attention: run, measure and inspect it");
  app.name("msa");
  app.formatter(std::make_shared<HelpFormat>());
  app.set_version_flag("--version", "msa " MSA_VERSION_STRING);
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 ok, 1 a check failed or a result that is no number, 2 bad input (one line on\n"
      "stderr says what).\n"
      "Examples:\n"
      "  msa info\n"
      "  msa eval --model models/code-11m --text models/code-11m/sample.txt --context 16384\n"
      "  msa bench --shape code-11m --op dense_attention,msa --context 8192\n"
      "`msa COMMAND --help` explains each command; docs/cli.md has them all.");
  Action action;
  for (auto* add :
       {add_eval, add_generate, add_attend, add_inspect, add_check, add_bench, add_info})
    add(app, &action);

  try {
    app.parse(argc, argv);
    bool passed = true;
    const Status status = action(&passed);
    const int code = !status.ok() ? fail(status) : passed ? kOk : kFailedCheck;
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0)
      return fail(fmt::format("stdout: cannot be written, {}", std::strerror(errno)));
    return code;
  } catch (const CLI::Success& request) {  // --help, --version
    return app.exit(request);
  } catch (const CLI::ParseError& error) {
    const std::vector<CLI::App*> chosen = app.get_subcommands();
    if (const std::vector<std::string> other = app.remaining(); chosen.empty() && !other.empty())
      return fail(fmt::format("got \"{}\", expected a command: {} (see `msa --help`)",
                              other.front(), fmt::join(names_of(app), ", ")));
    return fail(fmt::format("{} (see `msa {}--help`)", error.what(),
                            chosen.empty() ? "" : chosen.front()->get_name() + " "));
  } catch (const std::bad_alloc&) {
    return fail("out of memory; try a smaller --context or --batch");
  } catch (const std::exception& error) {
    return fail(error.what());
  }
}
