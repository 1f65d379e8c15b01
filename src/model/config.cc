#include "model/config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>

#include "core/text.h"

namespace msa::model {
namespace {

using nlohmann::json;

// A value for a message, cut where it is long.
std::string shown(const json& value) {
  const std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true);
  return text.size() <= 60 ? text : text.substr(0, 60) + "...";
}

// Whether a key is there with a value.
bool has(const json& object, const char* key) {
  return object.contains(key) && !object[key].is_null();
}

// Reads keys of one JSON object; the first error sticks, and later reads do nothing.
class Reader {
 public:
  explicit Reader(const json& object) : object_(object) {}

  // A whole number in [least, most]; a missing key is an error.
  template <class Int>
  void integer(const char* key, int64_t least, int64_t most, Int* out) {
    if (!status_.ok() || missing(key)) return;
    const json& value = object_[key];
    const bool fits = value.is_number_integer() &&
                      (!value.is_number_unsigned() || value.get<uint64_t>() <= uint64_t{1} << 62);
    if (!fits || value.get<int64_t>() < least || value.get<int64_t>() > most) {
      status_ = invalid(key, ": got ", shown(value), ", expected a whole number from ", least,
                        " to ", most);
      return;
    }
    *out = static_cast<Int>(value.get<int64_t>());
  }

  // A finite number > 0; a missing key is an error.
  void positive(const char* key, double* out) {
    if (!status_.ok() || missing(key)) return;
    const json& value = object_[key];
    const double number = value.is_number() ? value.get<double>() : 0;
    if (!std::isfinite(number) || number <= 0) {
      status_ = invalid(key, ": got ", shown(value), ", expected a number > 0");
      return;
    }
    *out = number;
  }

  // The key may be absent: `out` keeps its default.
  void optional_positive(const char* key, double* out) {
    if (has(object_, key)) positive(key, out);
  }

  const Status& status() const { return status_; }

 private:
  bool missing(const char* key) {
    if (object_.contains(key)) return false;
    status_ = invalid(key, ": missing");
    return true;
  }

  const json& object_;
  Status status_;
};

// Generous bounds that keep every product of two sizes inside 64 bits.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxCount = int64_t{1} << 16;

// One flag per layer from a list of names ("full_attention"/"minimax_m3_sparse") or of 0/1.
Status parse_layers(const json& list, const char* key, std::string_view off, std::string_view on,
                    size_t layers, std::vector<bool>* out) {
  if (!list.is_array() || list.size() != layers)
    return invalid(key, ": expected a list with one entry for each of the ", layers, " layers");
  out->clear();
  for (const json& entry : list) {
    const bool is_on = entry == on || entry == 1 || entry == true;
    if (!is_on && entry != off && entry != 0 && entry != false)
      return invalid(key, ": got ", shown(entry), ", expected ", off, " or ", on);
    out->push_back(is_on);
  }
  return {};
}

Status parse_layer_types(const json& text, const json& sparse, Config* config) {
  const size_t layers = config->layers.size();
  std::vector<bool> is_sparse(layers, false), is_moe;
  if (has(text, "layer_types")) {
    MSA_TRY(parse_layers(text["layer_types"], "layer_types", "full_attention", "minimax_m3_sparse",
                         layers, &is_sparse));
  } else if (sparse.contains("sparse_attention_freq")) {
    MSA_TRY(parse_layers(sparse["sparse_attention_freq"], "sparse_attention_freq", "0", "1", layers,
                         &is_sparse));
  }
  if (has(text, "mlp_layer_types")) {
    MSA_TRY(parse_layers(text["mlp_layer_types"], "mlp_layer_types", "dense", "sparse", layers,
                         &is_moe));
  } else if (text.contains("moe_layer_freq")) {
    MSA_TRY(parse_layers(text["moe_layer_freq"], "moe_layer_freq", "0", "1", layers, &is_moe));
  } else {
    is_moe.assign(layers, true);  // as in the model code: MoE unless said otherwise
  }
  for (size_t i = 0; i < layers; ++i) config->layers[i] = {is_sparse[i], is_moe[i]};
  return {};
}

// Refuses what asks for another computation than the one here: `served` has the values that do not,
// by key. Absent and null are fine as well.
Status check_fixed(const json& object, const json& served) {
  for (const auto& [key, values] : served.items()) {
    if (!has(object, key.c_str())) continue;
    if (std::ranges::find(values, object[key]) != values.end()) continue;
    std::string names = values.empty() ? "plain weights: BF16, F16 or F32" : "";
    for (const json& value : values) names += (names.empty() ? "" : " or ") + shown(value);
    return error(StatusCode::kUnsupported, key, ": got ", shown(object[key]), ", supported ",
                 values.empty() ? "are " : "is ", names);
  }
  return {};
}

// Of every level of the file. Both names of `hidden_act` mean the MLP of swiglu_alpha and
// swiglu_limit.
Status check_level(const json& level) {
  static const json served = json::parse(R"({
    "attention_bias": [false], "attention_output_gate": [false], "compression_config": [],
    "hidden_act": ["silu", "swigluoai"], "is_causal": [true], "mlp_bias": [false], "n_group": [1],
    "n_shared_experts": [1], "norm_topk_prob": [true], "per_layer_config": [{}],
    "qk_norm_type": ["per_head"], "quantization_config": [], "scoring_func": ["sigmoid"],
    "swiglu_beta": [1], "tie_word_embeddings": [false], "use_gemma_norm": [true],
    "use_qk_norm": [true], "use_routing_bias": [true]})");
  MSA_TRY(check_fixed(level, served));
  if (has(level, "sliding_window") && level.value("use_sliding_window", json()) != false)
    return error(StatusCode::kUnsupported, "sliding_window: got ", shown(level["sliding_window"]),
                 ", supported is null: no window");
  return {};
}

// RoPE as transformers finds it: a `rope_scaling` that is not empty replaces `rope_parameters`, and
// what stands in it precedes what stands beside it. `rotary_dim` is read nowhere.
Status parse_rope(const json& text, Config* config) {
  static const json nothing = json::object();
  const json* inner = &nothing;
  std::string place;
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    if (!has(text, key)) continue;
    if (!text[key].is_object())
      return invalid(key, ": got ", shown(text[key]), ", expected an object");
    if (!text[key].empty()) inner = &text[key], place = key;
  }
  for (const auto& [key, value] : inner->items()) {
    if (value.is_object())
      return error(StatusCode::kUnsupported, place, ".", key, ": got ", shown(value),
                   ", supported is one RoPE for all layers");
  }
  const char* type = inner->contains("rope_type") ? "rope_type" : "type";
  if (inner->contains(type) && (*inner)[type] != "default")
    return error(StatusCode::kUnsupported, place, ".", type, ": got ", shown((*inner)[type]),
                 ", supported is \"default\"");
  Reader rope(*inner), flat(text);
  double factor = 1;
  if (inner->contains("partial_rotary_factor"))
    rope.positive("partial_rotary_factor", &factor);
  else
    flat.optional_positive("partial_rotary_factor", &factor);
  (inner->contains("rope_theta") ? rope : flat).positive("rope_theta", &config->rope_theta);
  MSA_TRY(rope.status());
  MSA_TRY(flat.status());
  if (factor > 1) return invalid("partial_rotary_factor: got ", factor, ", expected at most 1");
  config->rotary_dim = static_cast<int32_t>(config->head_dim * factor);
  return {};
}

Status parse_index_branch(const json& text, const json& sparse, Config* config) {
  static const json served = json::parse(R"({
    "sparse_score_type": ["max"], "use_sparse_attention": [true]})");
  for (const json* place : {&text, &sparse}) MSA_TRY(check_fixed(*place, served));
  Reader module(text), released(sparse);
  const auto read = [&](const char* key, const char* released_key, int64_t least, bool needed,
                        int32_t* out) {
    if (has(sparse, released_key)) {
      released.integer(released_key, least, kMaxCount, out);
    } else if (needed || has(text, key)) {
      module.integer(key, least, kMaxCount, out);
    }
  };
  if (has(sparse, "sparse_disable_index_value")) {
    std::vector<bool> off;
    MSA_TRY(parse_layers(sparse["sparse_disable_index_value"], "sparse_disable_index_value", "0",
                         "1", config->layers.size(), &off));
    for (size_t i = 0; i < off.size(); ++i) {
      if (config->layers[i].sparse && !off[i])
        return error(StatusCode::kUnsupported, "sparse_disable_index_value: got 0 for layer ", i,
                     ", supported is 1: an index branch without values");
    }
  }
  int32_t heads = 0;
  read("index_n_heads", "sparse_num_index_heads", 1, true, &heads);
  read("index_head_dim", "sparse_index_dim", 1, true, &config->index_dim);
  read("index_block_size", "sparse_block_size", 1, true, &config->block_size);
  read("index_topk_blocks", "sparse_topk_blocks", 1, true, &config->topk);
  read("index_local_blocks", "sparse_local_block", 0, false, &config->local_blocks);
  read("index_init_blocks", "sparse_init_block", 0, false, &config->init_blocks);
  MSA_TRY(released.status());
  MSA_TRY(module.status());
  if (heads != config->heads_kv)
    return error(StatusCode::kUnsupported, "index_n_heads: got ", heads,
                 ", supported is one index head per KV head (", config->heads_kv, ")");
  return {};
}

Status parse_text_config(const json& text, Config* config) {
  Reader reader(text);
  int32_t layers = 0;
  reader.integer("vocab_size", 1, kMaxSize, &config->vocab_size);
  reader.integer("hidden_size", 1, kMaxSize, &config->hidden_size);
  reader.integer("num_hidden_layers", 1, kMaxCount, &layers);
  reader.integer("num_attention_heads", 1, kMaxCount, &config->heads_q);
  reader.integer("num_key_value_heads", 1, kMaxCount, &config->heads_kv);
  reader.integer("head_dim", 1, kMaxCount, &config->head_dim);
  reader.optional_positive("rms_norm_eps", &config->norm_eps);
  reader.optional_positive("swiglu_alpha", &config->swiglu_alpha);
  reader.optional_positive("swiglu_limit", &config->swiglu_limit);
  MSA_TRY(reader.status());
  const json none = json::object();
  const char* released = "sparse_attention_config";
  const json& sparse = has(text, released) ? text[released] : none;
  if (!sparse.is_object())
    return invalid("sparse_attention_config: got ", shown(sparse), ", expected an object");
  config->layers.resize(static_cast<size_t>(layers));
  MSA_TRY(parse_layer_types(text, sparse, config));
  MSA_TRY(parse_rope(text, config));
  if (config->sparse_layers() > 0) MSA_TRY(parse_index_branch(text, sparse, config));

  if (std::ranges::any_of(config->layers, [](LayerConfig layer) { return !layer.moe; }))
    reader.integer("dense_intermediate_size", 1, kMaxSize, &config->dense_intermediate);
  if (config->has_moe()) {
    reader.integer("intermediate_size", 1, kMaxSize, &config->expert_intermediate);
    reader.integer("shared_intermediate_size", 1, kMaxSize, &config->shared_intermediate);
    reader.integer("num_local_experts", 1, kMaxCount, &config->experts);
    reader.integer("num_experts_per_tok", 1, kMaxCount, &config->experts_per_token);
    reader.optional_positive("routed_scaling_factor", &config->routed_scaling);
  }
  if (has(text, "eos_token_id")) {  // one id or a list of them
    for (const json& id : json::array({text["eos_token_id"]}).flatten())
      if (id.is_number_unsigned() && id.get<uint64_t>() < static_cast<uint64_t>(kMaxSize))
        config->eos_tokens.push_back(id.get<int32_t>());
  }
  MSA_TRY(reader.status());
  return validate(*config);
}

}  // namespace

int64_t Config::sparse_layers() const {
  return std::ranges::count_if(layers, [](LayerConfig layer) { return layer.sparse; });
}

bool Config::has_moe() const {
  return std::ranges::any_of(layers, [](LayerConfig layer) { return layer.moe; });
}

Status validate(const Config& config) {
  if (config.heads_q % config.heads_kv != 0)
    return invalid("num_attention_heads: got ", config.heads_q,
                   ", expected a multiple of num_key_value_heads (", config.heads_kv, ")");
  if (config.rotary_dim % 2 != 0 || config.rotary_dim > config.head_dim)
    return invalid("partial_rotary_factor: gives ", config.rotary_dim, " of ", config.head_dim,
                   " channels, expected an even number of them");
  if (config.has_moe() && config.experts_per_token > config.experts)
    return invalid("num_experts_per_tok: got ", config.experts_per_token,
                   ", expected at most num_local_experts (", config.experts, ")");
  if (config.sparse_layers() == 0) return {};
  if (config.topk < 1) return invalid("index_topk_blocks: got ", config.topk, ", expected >= 1");
  if (config.init_blocks + config.local_blocks > config.topk)
    return invalid("forced blocks: got init ", config.init_blocks, " + local ", config.local_blocks,
                   ", expected at most index_topk_blocks (", config.topk, ")");
  if (config.rotary_dim > config.index_dim)
    return error(StatusCode::kUnsupported, "index_head_dim: got ", config.index_dim,
                 ", supported is at least the rotary size (", config.rotary_dim, ")");
  return {};
}

Status parse_config(std::string_view source, Config* out) {
  *out = {};
  bool too_deep = false;
  const auto watch = [&](int depth, json::parse_event_t, json&) {
    too_deep = too_deep || depth > 16;
    return !too_deep;
  };
  const json root = json::parse(source, watch, /*allow_exceptions=*/false);
  if (too_deep || !root.is_object()) return invalid("not valid JSON, expected an object");
  const json type = root.value("model_type", json("minimax_m3_vl"));
  if (!type.is_string() || !type.get_ref<const std::string&>().starts_with("minimax_m3"))
    return error(StatusCode::kUnsupported, "model_type: got ", shown(type),
                 ", supported are minimax_m3_vl_text and minimax_m3_vl");
  const bool nested = has(root, "text_config");
  const json& text = nested ? root["text_config"] : root;
  if (nested && type == "minimax_m3_vl_text")
    return invalid("text_config: got ", shown(text), ", expected none in a minimax_m3_vl_text");
  if (!text.is_object()) return invalid("text_config: got ", shown(text), ", expected an object");
  for (const json* level : {&root, &text}) MSA_TRY(check_level(*level));
  return parse_text_config(text, out);
}

}  // namespace msa::model
