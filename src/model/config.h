// What a checkpoint's config.json says, in one form.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "msa/status.h"

namespace msa::model {

struct LayerConfig {
  bool sparse = false;  ///< sparse attention behind an index branch, else full attention
  bool moe = false;     ///< routed experts and a shared one, else a dense MLP
};

struct Config {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  std::vector<LayerConfig> layers;

  int32_t heads_q = 0;     ///< Hq, a multiple of heads_kv
  int32_t heads_kv = 0;    ///< Hkv
  int32_t head_dim = 0;    ///< D
  int32_t rotary_dim = 0;  ///< leading channels of a head that RoPE turns, half-split pairs
  double rope_theta = 0;
  double norm_eps = 1e-6;

  // The index branch; unused without sparse layers. Index heads = heads_kv.
  int32_t index_dim = 128;   ///< Di
  int32_t block_size = 128;  ///< Bk; also the page size of the caches
  int32_t topk = 16;         ///< K
  int32_t init_blocks = 0;
  int32_t local_blocks = 1;

  int64_t dense_intermediate = 0;   ///< of dense MLPs
  int64_t expert_intermediate = 0;  ///< of one routed expert
  int64_t shared_intermediate = 0;  ///< of the shared expert
  int32_t experts = 0;
  int32_t experts_per_token = 0;
  double routed_scaling = 2.0;
  double swiglu_alpha = 1.702;
  double swiglu_limit = 7.0;

  std::vector<int32_t> eos_tokens;

  int64_t sparse_layers() const;
  bool has_moe() const;
  /// True when token ids are bytes plus a few extras, so that text needs no tokenizer.
  bool byte_level() const { return vocab_size >= 256 && vocab_size <= 512; }
};

/// Checks what a Config promises, as parse_config does; call it again after changing one (topk).
/// Errors: kInvalidArgument or kUnsupported with key, value and what is supported.
Status validate(const Config& config);

/// Reads config.json: the module form of Hugging Face's minimax_m3_vl text model, or the released
/// checkpoint's form (nested in `text_config`, with `sparse_attention_config` and
/// `moe_layer_freq`). Keys are read where transformers reads them, as python/msa_cpp/_config.py
/// does; tests/config_cases.json holds both to it. Errors name the key, what was given and what is
/// supported, also where a key asks for a computation that is not here.
Status parse_config(std::string_view json, Config* out);

}  // namespace msa::model
