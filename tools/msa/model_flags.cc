#include "msa/model_flags.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>

#include "model/tokens.h"

namespace msa::cli {

void add_model_flags(CLI::App* command, ModelFlags* flags) {
  command->add_option("--model", flags->directory, "Directory with config.json and safetensors")
      ->required();
  command
      ->add_option("--dtype", flags->dtype,
                   "Of q, k, v and the caches (default f32 on the CPU, bf16 on CUDA)")
      ->check(CLI::IsMember({"f32", "bf16"}));
}

Status load_model(const ModelFlags& flags, const Common& common,
                  std::unique_ptr<model::Model>* out) {
  std::optional<DType> dtype;
  if (!flags.dtype.empty()) dtype = flags.dtype == "bf16" ? DType::kBF16 : DType::kF32;
  return model::Model::load(
      flags.directory,
      {.dtype = dtype, .backend = common.backend, .threads = common.threads, .topk = flags.topk},
      out);
}

Status require_byte_vocabulary(const model::Config& config) {
  if (config.byte_level()) return {};
  return Status(StatusCode::kUnsupported,
                fmt::format("text needs a byte vocabulary (256 to 512 ids), this model has {} ids; "
                            "give --token-ids",
                            config.vocab_size));
}

void add_input_flags(CLI::App* command, InputFlags* flags, int64_t most) {
  CLI::Option_group* input = command->add_option_group("Input", "One of these:");
  input->add_option("--text", flags->text, "Text, read as bytes, for byte vocabularies");
  input->add_option("--token-ids", flags->token_ids, "Ids: int32 .npy or safetensors");
  input->require_option(1);
  command
      ->add_option("--context", flags->context,
                   fmt::format("Tokens to read; default the file, cut to {}", kDefaultContext))
      ->check(CLI::Range(int64_t{2}, most));
}

Status load_input(const model::Config& config, const InputFlags& flags, std::vector<int32_t>* out) {
  const bool is_given = flags.context > 0;
  const int64_t limit = is_given ? flags.context : kDefaultContext;
  MSA_TRY(load_tokens(config, flags.text, flags.token_ids, is_given ? limit : limit + 1, out));
  if (std::ssize(*out) > limit) {
    out->resize(static_cast<size_t>(limit));
    note(
        fmt::format("{}: cut to its first {} tokens, --context N reads more", flags.path(), limit));
  }
  if (std::ssize(*out) < std::max<int64_t>(2, flags.context))
    return bad_input("{}: got {} tokens, expected at least {}", flags.path(), out->size(),
                     is_given ? fmt::format("{}, as --context says", flags.context) : "2");
  return {};
}

Status load_tokens(const model::Config& config, const std::string& text_path,
                   const std::string& ids_path, int64_t limit, std::vector<int32_t>* out) {
  if (!ids_path.empty()) {
    MSA_TRY(model::read_token_ids(ids_path, out));
    if (static_cast<int64_t>(out->size()) > limit) out->resize(static_cast<size_t>(limit));
    return {};
  }
  MSA_TRY(require_byte_vocabulary(config));
  std::string text;
  MSA_TRY(read_text(text_path, limit, &text));
  *out = model::tokens_of(text);
  return {};
}

model::Hooks shown_by(Progress* progress) {
  model::Hooks hooks;
  hooks.on_progress = [=](int64_t done, int64_t total) {
    progress->update(done, total);
    return true;
  };
  return hooks;
}

}  // namespace msa::cli
