// The weights of a checkpoint, packed for a device.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "model/compute.h"
#include "model/config.h"

namespace msa::model {

using MatrixPtr = std::unique_ptr<Matrix>;

struct MlpWeights {
  MatrixPtr gate_up;  ///< [2I,H], gate rows first
  MatrixPtr down;     ///< [H,I]
};

struct MoeWeights {
  MatrixPtr router;         ///< [E,H]
  std::vector<float> bias;  ///< host [E], steers the choice of experts only
  std::vector<MlpWeights> experts;
  MlpWeights shared;
};

struct LayerWeights {
  Norm input_norm, mlp_norm;
  MatrixPtr q, k, v, o;
  Norm q_norm, k_norm;
  MatrixPtr index_q, index_k;  ///< null in layers of full attention
  Norm index_q_norm, index_k_norm;
  MlpWeights mlp;  ///< of dense layers
  MoeWeights moe;  ///< of MoE layers
};

struct Weights {
  Buffer embedding;  ///< f32 [vocab,H]
  std::vector<LayerWeights> layers;
  Norm norm;
  MatrixPtr head;  ///< [vocab,H]
};

/// Loads model.safetensors, or the shards that model.safetensors.index.json names. Accepts the
/// names of Hugging Face's modules and those of the released checkpoint. Errors: a missing file or
/// tensor, a tensor no layer asks for, one that two files hold and the index gives to neither,
/// another dtype (f32, bf16 and f16 are read) or shape (both are named), NaN or infinity (the first
/// such tensor is named). Files are mapped only while loading.
Status load_weights(const std::filesystem::path& directory, const Config& config, Compute& compute,
                    Weights* out);

}  // namespace msa::model
