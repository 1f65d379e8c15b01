#include "model/generation_config.h"

#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "core/text.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

using nlohmann::json;

bool is_id(const json& value) {
  return value.is_number_unsigned() &&
         value.get<uint64_t>() <= uint64_t{std::numeric_limits<int32_t>::max()};
}

Status parse_eos(const json& given, std::vector<int32_t>* out) {
  if (given.is_null()) return {};
  for (const json& id : given.is_array() ? given : json::array({given})) {
    if (!is_id(id))
      return invalid("eos_token_id: got ", given.dump(), ", expected a token id or a list of them");
    out->push_back(id.get<int32_t>());
  }
  return {};
}

Status parse_sampler(const json& root, SamplerOptions* out) {
  const json sample = root.value("do_sample", json());
  if (!sample.is_null() && !sample.is_boolean())
    return invalid("do_sample: got ", sample.dump(), ", expected true or false");
  if (sample != true) return {};
  out->temperature = 1;
  out->top_k = 50;
  const auto number = [&](const char* key, float* value) {
    const json given = root.value(key, json());
    if (given.is_null()) return Status();
    if (!given.is_number()) return invalid(key, ": got ", given.dump(), ", expected a number");
    *value = given.get<float>();
    return Status();
  };
  MSA_TRY(number("temperature", &out->temperature));
  MSA_TRY(number("top_p", &out->top_p));
  if (const json given = root.value("top_k", json()); !given.is_null()) {
    if (!is_id(given))
      return invalid("top_k: got ", given.dump(), ", expected a whole number >= 0");
    out->top_k = given.get<int32_t>();
  }
  Sampler ranges;
  return Sampler::create(*out, &ranges);
}

}  // namespace

Status parse_generation_config(std::string_view text, GenerationConfig* out) {
  *out = {};
  const json root = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!root.is_object()) return invalid("not valid JSON, expected an object");
  MSA_TRY(parse_eos(root.value("eos_token_id", json()), &out->eos_tokens));
  return parse_sampler(root, &out->sampler);
}

Status load_generation_config(const std::filesystem::path& directory, const Config& config,
                              GenerationConfig* out) {
  *out = {};
  const std::filesystem::path path = directory / "generation_config.json";
  if (std::filesystem::exists(path)) {
    std::unique_ptr<MappedFile> file;
    MSA_TRY(MappedFile::open(path, &file));
    MSA_TRY(in_file(path, parse_generation_config(file->text(), out)));
  }
  if (out->eos_tokens.empty()) out->eos_tokens = config.eos_tokens;
  return {};
}

}  // namespace msa::model
