#include "model/weights.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>

#include "core/half.h"
#include "core/text.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

// The released checkpoint's names and those of the multimodal wrapper -> the text model's module
// names. Returns "" for what is no part of the text model.
std::string module_name(std::string name) {
  const auto replace = [&](std::string_view from, std::string_view to) {
    if (const size_t at = name.find(from); at != std::string::npos)
      name.replace(at, from.size(), to);
  };
  if (name.starts_with("language_model.")) name.erase(0, std::strlen("language_model."));
  replace("model.language_model.", "model.");
  for (const char* other :
       {"mtp.", "model.mtp.", "vision_tower.", "model.vision_tower.", "multi_modal_projector.",
        "model.multi_modal_projector.", "patch_merge_mlp."})
    if (name.starts_with(other)) return "";
  replace(".self_attn.index_", ".self_attn.indexer.");
  replace(".block_sparse_moe.e_score_correction_bias", ".mlp.gate.e_score_correction_bias");
  replace(".block_sparse_moe.", ".mlp.");
  return name;
}

// The place of the first value whose exponent is all ones, which only NaN and infinity have, or -1.
template <class Bits>
int64_t find_not_finite(std::span<const std::byte> bytes, Bits exponent) {
  constexpr size_t kPiece = 4096;  // counts in a Bits, without an exit: such a loop vectorises
  const size_t count = bytes.size() / sizeof(Bits);
  const auto is_none = [&](size_t i) {
    Bits value;
    std::memcpy(&value, bytes.data() + i * sizeof(Bits), sizeof(Bits));
    return static_cast<Bits>((value & exponent) == exponent);
  };
  for (size_t begin = 0; begin < count; begin += kPiece) {
    const size_t end = std::min(count, begin + kPiece);
    Bits found = 0;
    for (size_t i = begin; i < end; ++i) found = static_cast<Bits>(found + is_none(i));
    if (found == 0) continue;
    while (is_none(begin) == 0) ++begin;
    return static_cast<int64_t>(begin);
  }
  return -1;
}

int64_t find_not_finite(const TensorEntry& entry, DType dtype) {
  if (dtype == DType::kF32) return find_not_finite<uint32_t>(entry.bytes, 0x7f800000);
  return find_not_finite<uint16_t>(entry.bytes, dtype == DType::kBF16 ? 0x7f80 : 0x7c00);
}

// "[row,column]" of a place in memory order.
std::string place_text(const TensorEntry& entry, int64_t place) {
  std::vector<int64_t> indices(entry.shape.size());
  for (size_t axis = indices.size(); axis-- > 0; place /= entry.shape[axis])
    indices[axis] = place % entry.shape[axis];
  return shape_text(indices);
}

// The tensors of a checkpoint under their module names; each is taken at most once.
class Checkpoint {
 public:
  Status open(const fs::path& directory) {
    if (fs::exists(directory / kIndexFile)) {
      MSA_TRY(open_shards(directory));
    } else if (fs::exists(directory / kSingleFile)) {
      MSA_TRY(SafetensorsFile::open(directory / kSingleFile, &files_.emplace_back()));
    } else {
      return error(StatusCode::kIo, directory.string(), ": has neither ", kSingleFile, " nor ",
                   kIndexFile);
    }
    for (const SafetensorsFile& file : files_) {
      for (const TensorEntry& entry : file.entries) {
        const std::string name = module_name(entry.name);
        if (name.empty() || is_elsewhere(entry.name, file.path)) continue;
        const auto [first, is_new] = tensors_.try_emplace(name, Tensor{&file, &entry});
        if (!is_new)
          return invalid("tensor ", entry.name, ": given twice, by ",
                         first->second.file->path.string(), " and by ", file.path.string());
      }
    }
    return {};
  }

  bool has(const std::string& name) const { return tensors_.contains(name); }

  // The entry `name`, checked for shape, a floating dtype and finite values.
  Status take(const std::string& name, std::initializer_list<int64_t> shape,
              const TensorEntry** out, DType* dtype) {
    const auto found = tensors_.find(name);
    if (found == tensors_.end()) return invalid("tensor ", name, ": missing in the checkpoint");
    const TensorEntry& entry = *found->second.entry;
    const std::string where =
        text(found->second.file->path.string(), ": tensor ", entry.name, ": ");
    if (!dtype_of(entry.dtype, dtype) || *dtype == DType::kI32)
      return error(StatusCode::kUnsupported, where, "dtype: got ", entry.dtype,
                   ", supported are F32, BF16 and F16");
    if (!std::ranges::equal(entry.shape, shape))
      return invalid(where, "shape: got ", shape_text(entry.shape), ", expected ",
                     shape_text(std::vector<int64_t>(shape)));
    if (const int64_t place = find_not_finite(entry, *dtype); place >= 0)
      return invalid(where, "element ", place_text(entry, place), " is NaN or infinity");
    *out = &entry;
    taken_.insert(name);
    return {};
  }

  Status check_all_taken() const {
    for (const auto& [name, tensor] : tensors_)
      if (!taken_.contains(name))
        return invalid(tensor.file->path.string(), ": tensor ", tensor.entry->name,
                       ": no part of the model that config.json describes");
    return {};
  }

 private:
  struct Tensor {
    const SafetensorsFile* file;
    const TensorEntry* entry;
  };

  // True for a tensor that the index places in another shard than `file`.
  bool is_elsewhere(const std::string& name, const fs::path& file) const {
    const auto placed = shard_of_.find(name);
    return placed != shard_of_.end() && placed->second != file.filename();
  }

  Status open_shards(const fs::path& directory) {
    const fs::path index = directory / kIndexFile;
    const auto bad = [&](const auto&... parts) { return invalid(index.string(), ": ", parts...); };
    std::unique_ptr<MappedFile> file;
    MSA_TRY(MappedFile::open(index, &file));
    const json root = json::parse(file->text(), nullptr, /*allow_exceptions=*/false);
    if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object())
      return bad("expected a JSON object with a weight_map");
    std::map<std::string, std::vector<std::string>> names_of;  // shard -> its tensors
    for (const auto& [name, shard] : root["weight_map"].items()) {
      if (!shard.is_string()) return bad("weight_map: ", name, ": expected a file name");
      const auto& place = shard.get_ref<const std::string&>();
      if (place.empty() || place.find('/') != std::string::npos || place == "..")
        return bad("weight_map: ", name, ": got ", shard.dump(), ", expected a plain file name");
      names_of[place].push_back(name);
      shard_of_[name] = place;
    }
    files_.reserve(names_of.size());  // entries keep their addresses
    for (const auto& [shard, names] : names_of) {
      if (!fs::exists(directory / shard))
        return bad("missing shard ", (directory / shard).string());
      SafetensorsFile& tensors = files_.emplace_back();
      MSA_TRY(SafetensorsFile::open(directory / shard, &tensors));
      for (const std::string& name : names)
        if (tensors.find(name) == nullptr)
          return invalid((directory / shard).string(), ": tensor ", name, ": missing, though ",
                         kIndexFile, " places it here");
    }
    return {};
  }

  std::vector<SafetensorsFile> files_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> shard_of_;  // as the index has it
  std::set<std::string> taken_;
};

// Takes tensors from a checkpoint into the forms of Weights.
class Loader {
 public:
  Loader(Checkpoint& checkpoint, Compute& compute, const Config& config)
      : checkpoint_(checkpoint), compute_(compute), config_(config) {}

  Status matrix(const std::string& name, int64_t n, int64_t k, MatrixPtr* out) {
    const TensorEntry* entry = nullptr;
    DType dtype{};
    MSA_TRY(checkpoint_.take(name, {n, k}, &entry, &dtype));
    *out = upload(entry->bytes, dtype, n, k);
    return {};
  }

  // Two matrices [n,k] over each other, as one [2n,k].
  Status stacked(const std::string& top, const std::string& bottom, int64_t n, int64_t k,
                 MatrixPtr* out) {
    const std::array<std::string, 2> names{top, bottom};
    std::vector<float> both;
    for (const std::string& name : names) {
      std::vector<float> half;
      MSA_TRY(floats(name, {n, k}, &half));
      both.insert(both.end(), half.begin(), half.end());
    }
    *out = compute_.upload(both.data(), DType::kF32, 2 * n, k);
    return {};
  }

  Status floats(const std::string& name, std::initializer_list<int64_t> shape,
                std::vector<float>* out) {
    const TensorEntry* entry = nullptr;
    DType dtype{};
    MSA_TRY(checkpoint_.take(name, shape, &entry, &dtype));
    out->resize(static_cast<size_t>(entry->numel()));
    const void* data = aligned(entry->bytes);
    for (size_t i = 0; i < out->size(); ++i)
      (*out)[i] = load_f32(data, dtype, static_cast<int64_t>(i));
    return {};
  }

  // The same in device memory.
  Status vector(const std::string& name, std::initializer_list<int64_t> shape, Buffer* out) {
    std::vector<float> values;
    MSA_TRY(floats(name, shape, &values));
    return Buffer::create(compute_, values, out);
  }

  Status norm(const std::string& name, int64_t dim, Norm* out) {
    out->dim = dim;
    out->eps = static_cast<float>(config_.norm_eps);
    return vector(name, {dim}, &out->weight);
  }

  // gate_up_proj, or gate_proj and up_proj.
  Status mlp(const std::string& prefix, int64_t intermediate, MlpWeights* out) {
    const int64_t hidden = config_.hidden_size;
    if (checkpoint_.has(prefix + "gate_proj.weight")) {
      MSA_TRY(stacked(prefix + "gate_proj.weight", prefix + "up_proj.weight", intermediate, hidden,
                      &out->gate_up));
    } else {
      MSA_TRY(matrix(prefix + "gate_up_proj.weight", 2 * intermediate, hidden, &out->gate_up));
    }
    return matrix(prefix + "down_proj.weight", hidden, intermediate, &out->down);
  }

  // experts.gate_up_proj [E,2I,H] and down_proj [E,H,I], or one w1 (gate), w3 (up), w2 (down) each.
  Status experts(const std::string& prefix, std::vector<MlpWeights>* out) {
    const int64_t count = config_.experts, hidden = config_.hidden_size;
    const int64_t inner = config_.expert_intermediate;
    out->resize(static_cast<size_t>(count));
    if (checkpoint_.has(prefix + "gate_up_proj")) {
      MSA_TRY(slices(prefix + "gate_up_proj", 2 * inner, hidden, &MlpWeights::gate_up, out));
      return slices(prefix + "down_proj", hidden, inner, &MlpWeights::down, out);
    }
    for (int64_t e = 0; e < count; ++e) {
      const std::string one = prefix + std::to_string(e) + ".";
      MlpWeights& expert = (*out)[static_cast<size_t>(e)];
      MSA_TRY(stacked(one + "w1.weight", one + "w3.weight", inner, hidden, &expert.gate_up));
      MSA_TRY(matrix(one + "w2.weight", hidden, inner, &expert.down));
    }
    return {};
  }

  Status layer(const std::string& prefix, LayerConfig kind, LayerWeights* out) {
    const int64_t hidden = config_.hidden_size, dim = config_.head_dim;
    const int64_t heads_q = config_.heads_q, heads_kv = config_.heads_kv;
    MSA_TRY(norm(prefix + "input_layernorm.weight", hidden, &out->input_norm));
    MSA_TRY(norm(prefix + "post_attention_layernorm.weight", hidden, &out->mlp_norm));
    const std::string attention = prefix + "self_attn.";
    MSA_TRY(matrix(attention + "q_proj.weight", heads_q * dim, hidden, &out->q));
    MSA_TRY(matrix(attention + "k_proj.weight", heads_kv * dim, hidden, &out->k));
    MSA_TRY(matrix(attention + "v_proj.weight", heads_kv * dim, hidden, &out->v));
    MSA_TRY(matrix(attention + "o_proj.weight", hidden, heads_q * dim, &out->o));
    MSA_TRY(norm(attention + "q_norm.weight", dim, &out->q_norm));
    MSA_TRY(norm(attention + "k_norm.weight", dim, &out->k_norm));
    if (kind.sparse) {
      const std::string index = attention + "indexer.";
      const int64_t index_dim = config_.index_dim;
      MSA_TRY(matrix(index + "q_proj.weight", heads_kv * index_dim, hidden, &out->index_q));
      MSA_TRY(matrix(index + "k_proj.weight", index_dim, hidden, &out->index_k));
      MSA_TRY(norm(index + "q_norm.weight", index_dim, &out->index_q_norm));
      MSA_TRY(norm(index + "k_norm.weight", index_dim, &out->index_k_norm));
    }
    if (!kind.moe) return mlp(prefix + "mlp.", config_.dense_intermediate, &out->mlp);
    const std::string moe = prefix + "mlp.";
    MSA_TRY(matrix(moe + "gate.weight", config_.experts, hidden, &out->moe.router));
    MSA_TRY(floats(moe + "gate.e_score_correction_bias", {config_.experts}, &out->moe.bias));
    MSA_TRY(experts(moe + "experts.", &out->moe.experts));
    return mlp(moe + "shared_experts.", config_.shared_intermediate, &out->moe.shared);
  }

 private:
  // Data at an address a float may have: in place, or copied where the file does not align it.
  const void* aligned(std::span<const std::byte> bytes) {
    if (reinterpret_cast<uintptr_t>(bytes.data()) % alignof(float) == 0) return bytes.data();
    scratch_.assign(bytes.begin(), bytes.end());
    return scratch_.data();
  }

  MatrixPtr upload(std::span<const std::byte> bytes, DType dtype, int64_t n, int64_t k) {
    return compute_.upload(aligned(bytes), dtype, n, k);
  }

  // One matrix [n,k] for each expert out of a tensor [E,n,k].
  Status slices(const std::string& name, int64_t n, int64_t k, MatrixPtr MlpWeights::* member,
                std::vector<MlpWeights>* experts) {
    const TensorEntry* entry = nullptr;
    DType dtype{};
    MSA_TRY(checkpoint_.take(name, {static_cast<int64_t>(experts->size()), n, k}, &entry, &dtype));
    const size_t step = entry->bytes.size() / experts->size();
    for (size_t e = 0; e < experts->size(); ++e)
      (*experts)[e].*member = upload(entry->bytes.subspan(e * step, step), dtype, n, k);
    return {};
  }

  Checkpoint& checkpoint_;
  Compute& compute_;
  const Config& config_;
  std::vector<std::byte> scratch_;
};

}  // namespace

Status load_weights(const fs::path& directory, const Config& config, Compute& compute,
                    Weights* out) {
  Checkpoint checkpoint;
  MSA_TRY(checkpoint.open(directory));
  Loader loader(checkpoint, compute, config);
  const int64_t vocab = config.vocab_size, hidden = config.hidden_size;
  MSA_TRY(loader.vector("model.embed_tokens.weight", {vocab, hidden}, &out->embedding));
  out->layers.resize(config.layers.size());
  for (size_t i = 0; i < config.layers.size(); ++i)
    MSA_TRY(
        loader.layer("model.layers." + std::to_string(i) + ".", config.layers[i], &out->layers[i]));
  MSA_TRY(loader.norm("model.norm.weight", hidden, &out->norm));
  MSA_TRY(loader.matrix("lm_head.weight", vocab, hidden, &out->head));
  return checkpoint.check_all_taken();
}

}  // namespace msa::model
