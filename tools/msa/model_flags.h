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

/// The first `limit` tokens of a text (a model with a byte vocabulary) or of a file of token ids,
Status load_tokens(const model::Config& config, const std::string& text_path,
                   const std::string& ids_path, int64_t limit, std::vector<int32_t>* out);

}  // namespace msa::cli
