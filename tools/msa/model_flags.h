// What the commands that run a model share: its flags, loading it, and token ids from files.
#pragma once

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "model/model.h"
#include "msa/common.h"

namespace msa::cli {

struct ModelFlags {
  std::string directory;
  std::string dtype;  ///< empty = the device's default
  int topk = 0;
};

/// Adds --model and --dtype.
void add_model_flags(CLI::App* command, ModelFlags* flags);

Status load_model(const ModelFlags& flags, const Common& common,
                  std::unique_ptr<model::Model>* out);

/// Ok if the model reads text without a tokenizer.
Status require_byte_vocabulary(const model::Config& config);

/// The text that a command reads.
struct InputFlags {
  std::string text, token_ids;  ///< one of them
  int64_t context = 0;          ///< 0 = kDefaultContext, or the whole file if it is shorter

  const std::string& path() const { return text.empty() ? token_ids : text; }
};

inline constexpr int64_t kDefaultContext = 16384;

/// Adds --text, --token-ids and --context (2 to `most`).
void add_input_flags(CLI::App* command, InputFlags* flags, int64_t most);

/// As many tokens as --context asks for; without it, says in a note that a longer file is cut.
/// Errors: fewer tokens than --context or than 2.
Status load_input(const model::Config& config, const InputFlags& flags, std::vector<int32_t>* out);

/// The first `limit` tokens of a text (a model with a byte vocabulary) or of a file of token ids.
Status load_tokens(const model::Config& config, const std::string& text_path,
                   const std::string& ids_path, int64_t limit, std::vector<int32_t>* out);

/// Hooks whose progress is that of reading tokens.
model::Hooks shown_by(Progress* progress);

}  // namespace msa::cli
