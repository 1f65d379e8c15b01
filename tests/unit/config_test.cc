#include "model/config.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string>

namespace msa::model {
namespace {

using nlohmann::json;

json read(const std::string& path) {
  std::ifstream in(std::string(MSA_SOURCE_DIR) + "/" + path);
  return json::parse(std::string(std::istreambuf_iterator<char>(in), {}));
}

json module_form() { return read("tests/golden/tiny/module/config.json"); }
json released_form() { return read("tests/golden/tiny/released/config.json"); }

// The error of a config with one change.
std::string error_of(const json& config) {
  Config out;
  return parse_config(config.dump(), &out).message();
}

void expect_error(const json& config, const std::string& part) {
  const std::string message = error_of(config);
  EXPECT_NE(message.find(part), std::string::npos) << "gave: " << message;
}

TEST(ConfigTest, ReadsTheShippedModel) {
  Config config;
  ASSERT_EQ(parse_config(read("models/code-11m/config.json").dump(), &config).message(), "");
  EXPECT_EQ(config.vocab_size, 384);
  EXPECT_EQ(config.hidden_size, 256);
  EXPECT_EQ(config.layers.size(), 6u);
  EXPECT_FALSE(config.layers[0].sparse);
  EXPECT_EQ(config.sparse_layers(), 5);
  EXPECT_FALSE(config.has_moe());
  EXPECT_EQ(config.rotary_dim, 64);
  EXPECT_EQ(config.rope_theta, 5e6);
  EXPECT_EQ(config.topk, 16);
  EXPECT_EQ(config.eos_tokens, (std::vector<int32_t>{1}));
  EXPECT_TRUE(config.byte_level());
}

TEST(ConfigTest, BothFormsSayTheSame) {
  Config module, released;
  ASSERT_EQ(parse_config(module_form().dump(), &module).message(), "");
  ASSERT_EQ(parse_config(released_form().dump(), &released).message(), "");
  for (const Config* config : {&module, &released}) {
    EXPECT_EQ(config->vocab_size, 96);
    ASSERT_EQ(config->layers.size(), 4u);
    EXPECT_FALSE(config->layers[0].sparse || config->layers[0].moe);
    EXPECT_TRUE(config->layers[1].sparse && !config->layers[1].moe);
    EXPECT_TRUE(config->layers[3].sparse && config->layers[3].moe);
    EXPECT_EQ(config->heads_q, 4);
    EXPECT_EQ(config->heads_kv, 2);
    EXPECT_EQ(config->head_dim, 64);
    EXPECT_EQ(config->rotary_dim, 32);
    EXPECT_EQ(config->rope_theta, 10000.0);
    EXPECT_EQ(config->norm_eps, 1e-5);
    EXPECT_EQ(config->index_dim, 64);
    EXPECT_EQ(config->block_size, 16);
    EXPECT_EQ(config->topk, 4);
    EXPECT_EQ(config->init_blocks, 0);
    EXPECT_EQ(config->local_blocks, 1);
    EXPECT_EQ(config->dense_intermediate, 96);
    EXPECT_EQ(config->expert_intermediate, 48);
    EXPECT_EQ(config->shared_intermediate, 32);
    EXPECT_EQ(config->experts, 4);
    EXPECT_EQ(config->experts_per_token, 2);
    EXPECT_EQ(config->routed_scaling, 1.5);
    EXPECT_EQ(config->swiglu_alpha, 1.5);
    EXPECT_EQ(config->swiglu_limit, 2.0);
    EXPECT_FALSE(config->byte_level());
  }
}

TEST(ConfigTest, EveryNeededKeyIsNamedWhenMissing) {
  for (const char* key :
       {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "dense_intermediate_size", "intermediate_size",
        "shared_intermediate_size", "num_local_experts", "num_experts_per_tok", "index_n_heads",
        "index_head_dim", "index_block_size", "index_topk_blocks"}) {
    json config = module_form();
    config.erase(key);
    expect_error(config, std::string(key) + ": missing");
  }
  json config = module_form();
  config["rope_parameters"].erase("rope_theta");
  expect_error(config, "rope_theta: missing");
}

TEST(ConfigTest, UnsupportedValuesSayWhatIsSupported) {
  const auto with = [](const char* key, const json& value) {
    json config = module_form();
    config[key] = value;
    return config;
  };
  expect_error(with("num_attention_heads", 5), "multiple of num_key_value_heads (2)");
  expect_error(with("index_topk_blocks", 0), "index_topk_blocks: got 0");
  expect_error(with("index_local_blocks", 5), "at most index_topk_blocks (4)");
  expect_error(with("index_n_heads", 4), "one index head per KV head (2)");
  expect_error(with("num_experts_per_tok", 5), "at most num_local_experts (4)");
  expect_error(with("hidden_size", -3), "hidden_size: got -3");
  expect_error(with("hidden_size", 2.5), "hidden_size: got 2.5");
  expect_error(with("hidden_size", "64"), "hidden_size: got \"64\"");
  expect_error(with("hidden_size", 1e30), "hidden_size");
  expect_error(with("head_dim", 18446744073709551615u), "head_dim");
  expect_error(with("rms_norm_eps", 0), "rms_norm_eps: got 0");
  expect_error(with("tie_word_embeddings", true), "supported is false");
  expect_error(with("model_type", "llama"), "supported are minimax_m3_vl_text");
  expect_error(with("layer_types", json::array({"full_attention"})), "each of the 4 layers");
  expect_error(with("layer_types", json::array({"a", "b", "c", "d"})), "minimax_m3_sparse");
  expect_error(with("num_hidden_layers", 1000000000), "num_hidden_layers");
  json config = module_form();
  config["rope_parameters"]["partial_rotary_factor"] = 1.5;
  expect_error(config, "partial_rotary_factor");
  config["rope_parameters"]["partial_rotary_factor"] = 0.52;  // 33 of 64 channels
  expect_error(config, "an even number");
  config = released_form();
  config["text_config"]["sparse_attention_config"]["sparse_score_type"] = "mean";
  expect_error(config, "supported is \"max\"");
  config["text_config"]["sparse_attention_config"] = json::object();
  config["text_config"]["layer_types"] =
      json::array({"full_attention", "minimax_m3_sparse", "full_attention", "full_attention"});
  expect_error(config, "index_n_heads: missing");
}

// The Python readers and transformers are held to the same file.
TEST(ConfigTest, KeysAreReadWhereTransformersReadsThem) {
  const json cases = read("tests/config_cases.json");
  ASSERT_GT(cases.size(), 50u);
  for (const json& one : cases) {
    json config = module_form();
    config.erase("rope_parameters");
    config["rope_theta"] = 1e4;
    config.update(one["change"]);
    json released = released_form();
    released["text_config"].erase("partial_rotary_factor");
    released["text_config"].update(one["change"]);
    for (const json& form : {config, released}) {
      SCOPED_TRACE(form.dump());
      if (one.contains("refused")) {
        expect_error(form, one["refused"]);
        continue;
      }
      Config out;
      ASSERT_EQ(parse_config(form.dump(), &out).message(), "");
      EXPECT_EQ(out.rope_theta, one["rope"][0].get<double>());
      EXPECT_EQ(out.rotary_dim, 64 * one["rope"][1].get<double>());
    }
  }
}

TEST(ConfigTest, WhatSwitchesTheLayerIsReadInEveryPlace) {
  json config = released_form();
  config["quantization_config"] = {{"quant_method", "fp8"}};
  expect_error(config, "quantization_config: got {\"quant_method\":\"fp8\"}, supported are plain");
  config = released_form();
  config["text_config"]["sparse_attention_config"]["use_sparse_attention"] = false;
  expect_error(config, "use_sparse_attention: got false, supported is true");
  config["text_config"]["sparse_attention_config"]["sparse_attention_freq"] = {0, 0, 0, 0};
  EXPECT_EQ(error_of(config), "");
  config = released_form();
  config["text_config"]["sparse_attention_config"]["sparse_disable_index_value"] = {0, 1, 0, 1};
  expect_error(config, "sparse_disable_index_value: got 0 for layer 2");
  config["text_config"]["sparse_attention_config"]["sparse_disable_index_value"] = {0, 1, 1, 1};
  EXPECT_EQ(error_of(config), "");
  config["text_config"]["sparse_attention_config"] = json::array({1});
  expect_error(config, "sparse_attention_config: got [1], expected an object");
  config = released_form();
  config["model_type"] = "minimax_m3_vl_text";  // which has its keys beside text_config
  expect_error(config, "text_config: got {");
  config["model_type"] = 3;
  expect_error(config, "model_type: got 3");
}

TEST(ConfigTest, WhatIsNoConfigIsAnError) {
  Config config;
  for (const char* text : {"", "[]", "{", "{\"text_config\":3}", "nul", "\xff\xfe"})
    EXPECT_FALSE(parse_config(text, &config).ok()) << text;
  EXPECT_FALSE(parse_config(std::string(100000, '['), &config).ok());
  const std::string text = module_form().dump();
  for (size_t size = 0; size < text.size(); size += 7)
    EXPECT_FALSE(parse_config(text.substr(0, size), &config).ok()) << size;
}

}  // namespace
}  // namespace msa::model
