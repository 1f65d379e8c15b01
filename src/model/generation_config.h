// What a checkpoint's generation_config.json says about continuing a text.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string_view>
#include <vector>

#include "model/config.h"
#include "model/sampler.h"
#include "msa/status.h"

namespace msa::model {

struct GenerationConfig {
  std::vector<int32_t> eos_tokens;  ///< each ends the text
  SamplerOptions sampler;           ///< greedy unless the file says do_sample
};

/// Reads eos_token_id (an id or a list) and, where do_sample is true, temperature (1), top_k (50)
/// and top_p (1), in brackets what transformers takes where the file is silent. All other keys are
/// ignored. Errors name the key, what was given and what is expected.
Status parse_generation_config(std::string_view json, GenerationConfig* out);

/// The same of a checkpoint's file. Without the file, or without eos_token_id in it, the ids of
/// config.json end a text. Errors carry the path.
Status load_generation_config(const std::filesystem::path& directory, const Config& config,
                              GenerationConfig* out);

}  // namespace msa::model
