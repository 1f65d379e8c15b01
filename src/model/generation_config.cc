#include "model/generation_config.h"

#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

#include "core/text.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

using nlohmann::json;

/// The value of `key`, or null where the file is silent.
json value_of(const json& object, const char* key) {
  return object.contains(key) ? object[key] : json();
}

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
  const json sample = value_of(root, "do_sample");
  if (!sample.is_null() && !sample.is_boolean())
    return invalid("do_sample: got ", sample.dump(), ", expected true or false");
  if (sample != true) return {};
  out->temperature = 1;
  out->top_k = 50;
  const auto number = [&](const char* key, float* value) {
    const json given = value_of(root, key);
    if (given.is_null()) return Status();
    if (!given.is_number()) return invalid(key, ": got ", given.dump(), ", expected a number");
    *value = given.get<float>();
    return Status();
  };
  MSA_TRY(number("temperature", &out->temperature));
  MSA_TRY(number("top_p", &out->top_p));
  if (const json given = value_of(root, "top_k"); !given.is_null()) {
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
  MSA_TRY(parse_eos(value_of(root, "eos_token_id"), &out->eos_tokens));
  return parse_sampler(root, &out->sampler);
}

Status load_generation_config(const std::filesystem::path& directory, const Config& config,
                              GenerationConfig* out) {
  *out = {};
  const std::filesystem::path path = directory / "generation_config.json";
  if (std::filesystem::exists(path)) {
    std::unique_ptr<MappedFile> file;
    MSA_TRY(MappedFile::open(path, &file));
    const std::string_view text(reinterpret_cast<const char*>(file->bytes().data()),
                                file->bytes().size());
    const Status status = parse_generation_config(text, out);
    if (!status.ok()) return error(status.code(), path.string(), ": ", status.message());
  }
  if (out->eos_tokens.empty()) out->eos_tokens = config.eos_tokens;
  return {};
}

}  // namespace msa::model
