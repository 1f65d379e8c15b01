// msa generate: continue a prompt, token by token, as the text comes.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>

#include "model/sampler.h"
#include "model/tokens.h"
#include "msa/commands.h"
#include "msa/model_flags.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  ModelFlags model;
  model::SamplerOptions sampler;
  std::string prompt, prompt_file, token_ids, attention = "msa";
  int64_t tokens = 128;
};

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Ids as text: bytes of a byte vocabulary, else numbers.
void print_token(const model::Config& config, int32_t token) {
  if (!config.byte_level()) {
    fmt::print("{} ", token);
  } else if (token < 256) {
    std::putchar(token);
  }
  std::fflush(stdout);
}

Status load_prompt(const Options& options, const model::Config& config,
                   std::vector<int32_t>* tokens) {
  if (options.prompt.empty())
    return load_tokens(config, options.prompt_file, options.token_ids, int64_t{1} << 30, tokens);
  MSA_TRY(require_byte_vocabulary(config));
  *tokens = model::tokens_of(options.prompt);
  return {};
}

int run_generate(const Options& options) {
  model::Sampler sampler;
  if (const Status status = model::Sampler::create(options.sampler, &sampler); !status.ok())
    return fail(status);
  std::unique_ptr<model::Model> model;
  if (const Status status = load_model(options.model, options.common, &model); !status.ok())
    return fail(status);
  const model::Config& config = model->config();
  std::vector<int32_t> prompt;
  if (const Status status = load_prompt(options, config, &prompt); !status.ok())
    return fail(status);
  if (prompt.empty()) return fail("the prompt is empty; give at least one token");

  std::unique_ptr<model::Session> session;
  const auto attention =
      options.attention == "msa" ? model::Attention::kMsa : model::Attention::kDense;
  const auto prompt_size = static_cast<int64_t>(prompt.size());
  if (const Status status =
          model::Session::create(*model, attention, prompt_size + options.tokens, &session);
      !status.ok())
    return fail(status);

  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  const Clock::time_point prefill_start = Clock::now();
  {
    Progress progress("prompt", options.common.quiet);
    model::Hooks hooks;
    hooks.on_progress = [&](int64_t done, int64_t total) {
      progress.update(done, total);
      return true;
    };
    if (const Status status = session->extend(prompt, logits, hooks); !status.ok())
      return fail(status);
  }
  const double prefill_seconds = seconds_since(prefill_start);

  const Clock::time_point start = Clock::now();
  int64_t made = 0;
  while (made < options.tokens) {
    const int32_t token = sampler.sample(logits);
    if (std::ranges::count(config.eos_tokens, token) > 0) break;
    print_token(config, token);
    if (++made == options.tokens) break;
    if (const Status status = session->extend({&token, 1}, logits); !status.ok())
      return fail(status);
  }
  const double decode_seconds = seconds_since(start);
  std::putchar('\n');
  std::fflush(stdout);
  if (!options.common.quiet && isatty(STDERR_FILENO) == 1)
    fmt::print(stderr, "\n{} prompt tokens in {} ({:.0f}/s), {} new tokens in {} ({:.1f}/s)\n",
               prompt_size, human_seconds(prefill_seconds),
               static_cast<double>(prompt_size) / prefill_seconds, made,
               human_seconds(decode_seconds), static_cast<double>(made) / decode_seconds);
  return kOk;
}

}  // namespace

CLI::App* add_generate(CLI::App& app, std::function<int()>* action) {
  auto options = std::make_shared<Options>();
  CLI::App* command = app.add_subcommand("generate", "Continue a prompt");
  add_model_flags(command, &options->model);
  CLI::Option_group* prompt = command->add_option_group("Prompt", "One of these:");
  prompt->add_option("--prompt", options->prompt, "Text");
  prompt->add_option("--prompt-file", options->prompt_file, "File with the text");
  prompt->add_option("--token-ids", options->token_ids, "Ids: int32 .npy or safetensors");
  prompt->require_option(1);
  command->add_option("--tokens", options->tokens, "New tokens at most (default 128)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 24));
  command->add_option("--attention", options->attention, "dense or msa (default)")
      ->check(CLI::IsMember({"dense", "msa"}));
  command->add_option("--temperature", options->sampler.temperature, "0 = greedy (default)");
  command->add_option("--top-p", options->sampler.top_p, "Nucleus, default 1 = all");
  command->add_option("--top-k-sampling", options->sampler.top_k, "Candidates, default 0 = all");
  command->add_option("--seed", options->sampler.seed, "Of the sampling, default 0");
  add_common(command, &options->common);
  command->footer(
      "Example:\n"
      "  msa generate --model models/code-11m --prompt 'def main(' --tokens 200 --temperature 0.7");
  command->callback([=] { *action = [=] { return run_generate(*options); }; });
  return command;
}

}  // namespace msa::cli
