#include "msa/model_flags.h"

#include <fmt/format.h>

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

}  // namespace msa::cli
