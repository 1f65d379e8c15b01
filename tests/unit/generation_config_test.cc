// generation_config.json: what is read of it, and what is refused.
#include "model/generation_config.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

namespace msa::model {
namespace {

GenerationConfig parse(const std::string& json) {
  GenerationConfig config;
  EXPECT_EQ(parse_generation_config(json, &config).message(), "") << json;
  return config;
}

TEST(GenerationConfigTest, EosIsAnIdOrAList) {
  EXPECT_EQ(parse(R"({"eos_token_id":7})").eos_tokens, (std::vector<int32_t>{7}));
  EXPECT_EQ(parse(R"({"eos_token_id":[2,300]})").eos_tokens, (std::vector<int32_t>{2, 300}));
  EXPECT_TRUE(parse(R"({"eos_token_id":null,"bos_token_id":1})").eos_tokens.empty());
}

TEST(GenerationConfigTest, SamplingCountsWhereDoSampleIsTrue) {
  const std::string values = R"("temperature":0.5,"top_k":20,"top_p":0.9)";
  for (const char* sample : {"", R"("do_sample":false,)", R"("do_sample":null,)"}) {
    const SamplerOptions options = parse(std::string("{") + sample + values + "}").sampler;
    EXPECT_EQ(options.temperature, 0);
    EXPECT_EQ(options.top_k, 0);
    EXPECT_EQ(options.top_p, 1);
  }
  const SamplerOptions given = parse(R"({"do_sample":true,)" + values + "}").sampler;
  EXPECT_EQ(given.temperature, 0.5f);
  EXPECT_EQ(given.top_k, 20);
  EXPECT_EQ(given.top_p, 0.9f);
  const SamplerOptions silent = parse(R"({"do_sample":true,"top_p":null})").sampler;
  EXPECT_EQ(silent.temperature, 1);
  EXPECT_EQ(silent.top_k, 50);
  EXPECT_EQ(silent.top_p, 1);
}

TEST(GenerationConfigTest, BadValuesAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {"{", "not valid JSON"},
      {"[1]", "expected an object"},
      {R"({"eos_token_id":"</s>"})", "eos_token_id: got \"</s>\", expected a token id"},
      {R"({"eos_token_id":[2,-1]})", "eos_token_id: got [2,-1]"},
      {R"({"eos_token_id":2.5})", "eos_token_id: got 2.5"},
      {R"({"eos_token_id":4294967296})", "eos_token_id: got 4294967296"},
      {R"({"do_sample":1})", "do_sample: got 1, expected true or false"},
      {R"({"do_sample":true,"temperature":"hot"})", "temperature: got \"hot\", expected a number"},
      {R"({"do_sample":true,"temperature":-1})", "temperature: got -1"},
      {R"({"do_sample":true,"top_p":1.5})", "top_p: got 1.5"},
      {R"({"do_sample":true,"top_k":0.5})", "top_k: got 0.5"}};
  for (const auto& [json, says] : cases) {
    GenerationConfig config;
    const std::string message = parse_generation_config(json, &config).message();
    EXPECT_NE(message.find(says), std::string::npos) << json << " gave: " << message;
  }
}

TEST(GenerationConfigTest, TheFileWinsOverConfigJson) {
  const std::filesystem::path folder = std::filesystem::path(testing::TempDir()) / "msa_generation";
  std::filesystem::create_directories(folder);
  const std::filesystem::path path = folder / "generation_config.json";
  Config model;
  model.eos_tokens = {5, 6};
  const auto eos = [&](const char* text) {
    std::ofstream(path) << text;
    GenerationConfig config;
    EXPECT_EQ(load_generation_config(folder, model, &config).message(), "");
    return config.eos_tokens;
  };
  EXPECT_EQ(eos(R"({"eos_token_id":[2,7]})"), (std::vector<int32_t>{2, 7}));
  EXPECT_EQ(eos("{}"), model.eos_tokens);
  std::ofstream(path) << "{";
  GenerationConfig config;
  const std::string message = load_generation_config(folder, model, &config).message();
  EXPECT_TRUE(message.starts_with(path.string() + ": ")) << message;
  std::filesystem::remove_all(folder);
  EXPECT_EQ(load_generation_config(folder, model, &config).message(), "");
  EXPECT_EQ(config.eos_tokens, model.eos_tokens);
}

}  // namespace
}  // namespace msa::model
