// msa generate: continue a prompt, token by token, as the text comes.
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <optional>

#include "model/generation_config.h"
#include "model/sampler.h"
#include "model/tokens.h"
#include "msa/commands.h"
#include "msa/model_flags.h"

namespace msa::cli {
namespace {

struct Options {
  Common common;
  ModelFlags model;
  std::optional<float> temperature, top_p;
  std::optional<int32_t> top_k;
  uint64_t seed = 0;
  std::string prompt, prompt_file, token_ids, attention = "msa";
  int64_t tokens = 128;
};

using Clock = std::chrono::steady_clock;

double seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

std::string rate(const char* kind, size_t tokens, double seconds) {
  return fmt::format("{} {} tokens in {} ({:.1f}/s)", tokens, kind, human_seconds(seconds),
                     static_cast<double>(tokens) / seconds);
}

/// Behind a prompt of ids, ids; behind a text, the bytes that ids below 256 are.
void print_token(const Options& options, int32_t token) {
  if (!options.token_ids.empty()) {
    fmt::print("{} ", token);
  } else if (token < 256) {
    std::putchar(token);
  }
  std::fflush(stdout);
}

Status load_prompt(const Options& options, const model::Config& config,
                   std::vector<int32_t>* tokens) {
  if (!options.prompt_file.empty() || !options.token_ids.empty())
    return load_tokens(config, options.prompt_file, options.token_ids, int64_t{1} << 30, tokens);
  MSA_TRY(require_byte_vocabulary(config));
  *tokens = model::tokens_of(options.prompt);
  return {};
}

Status read_prompt(model::Session& session, std::span<const int32_t> prompt,
                   std::span<float> logits, bool quiet) {
  Progress progress("prompt", quiet);
  return session.extend(prompt, logits, shown_by(&progress));
}

/// The checkpoint's options, where a flag does not say otherwise.
model::SamplerOptions sampler_options(const Options& options, model::SamplerOptions base) {
  base.temperature = options.temperature.value_or(base.temperature);
  base.top_p = options.top_p.value_or(base.top_p);
  base.top_k = options.top_k.value_or(base.top_k);
  base.seed = options.seed;
  return base;
}

Status run_generate(const Options& options) {
  model::Sampler sampler;
  MSA_TRY(model::Sampler::create(sampler_options(options, {}), &sampler));  // before the long work
  std::unique_ptr<model::Model> model;
  MSA_TRY(load_model(options.model, options.common, &model));
  const model::Config& config = model->config();
  model::GenerationConfig generation;
  MSA_TRY(model::load_generation_config(options.model.directory, config, &generation));
  MSA_TRY(model::Sampler::create(sampler_options(options, generation.sampler), &sampler));
  std::vector<int32_t> prompt;
  MSA_TRY(load_prompt(options, config, &prompt));
  if (prompt.empty()) return bad_input("the prompt is empty, expected at least one token");

  std::unique_ptr<model::Session> session;
  MSA_TRY(model::Session::create(
      *model, options.attention == "msa" ? model::Attention::kMsa : model::Attention::kDense,
      std::ssize(prompt) + options.tokens, &session));
  std::vector<float> logits(static_cast<size_t>(config.vocab_size));
  const Clock::time_point prefill = Clock::now();
  MSA_TRY(read_prompt(*session, prompt, logits, options.common.quiet));

  const Clock::time_point decode = Clock::now();
  int64_t made = 0;
  while (made < options.tokens) {
    const int32_t token = sampler.sample(logits);
    if (std::ranges::count(generation.eos_tokens, token) > 0) break;
    print_token(options, token);
    if (++made < options.tokens) MSA_TRY(session->extend({&token, 1}, logits));
  }
  std::putchar('\n');
  std::fflush(stdout);
  if (!options.common.quiet && isatty(STDERR_FILENO) == 1)
    fmt::print(stderr, "\n{}; {}\n", rate("prompt", prompt.size(), seconds(prefill, decode)),
               rate("new", static_cast<size_t>(made), seconds(decode, Clock::now())));
  return {};
}

}  // namespace

CLI::App* add_generate(CLI::App& app, Action* action) {
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
  command->add_option("--temperature", options->temperature, "0 = greedy (default)");
  command->add_option("--top-p", options->top_p, "Nucleus, default 1 = all");
  command->add_option("--top-k-sampling", options->top_k, "Candidates, default 0 = all");
  command->add_option("--seed", options->seed, "Of the sampling, default 0");
  add_common(command, &options->common);
  command->footer(
      "The model's generation_config.json is read for eos_token_id (else config.json's), which "
      "ends\n"
      "the text, and where its do_sample is true for temperature, top_p and top_k, the defaults "
      "of\n"
      "the flags then. --prompt and --prompt-file give text, --token-ids gives ids.\n"
      "Example:\n"
      "  msa generate --model models/code-11m --prompt 'def main(' --tokens 200 --temperature 0.7");
  command->callback([=] { *action = [=](bool*) { return run_generate(*options); }; });
  return command;
}

}  // namespace msa::cli
