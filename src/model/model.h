// M3-shaped text models: load a Hugging Face checkpoint, extend a sequence, read logits.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "model/config.h"
#include "msa/msa.h"

namespace msa::model {

enum class Attention { kDense, kMsa };

struct LoadOptions {
  /// Of q, k, v and the caches: f32 or bf16; default f32 on the CPU, bf16 on CUDA. On the CPU the
  /// weights keep their values, on CUDA they are rounded to it.
  std::optional<DType> dtype = std::nullopt;
  std::string backend = "auto";  ///< of the attention operators; also decides the device
  int threads = 0;               ///< 0 = all of the machine's
  int32_t topk = 0;              ///< 0 = the checkpoint's
};

/// Seconds of a Session so far. Vectors have one entry per layer.
struct Timings {
  double total = 0;               ///< inside extend(), without hooks and the measuring of kept mass
  std::vector<double> attention;  ///< index + select + attend; appending is not part of it
  std::vector<double> index;      ///< index + select alone, part of attention (Hooks::time_index)
};

/// What a caller may watch or steer during extend(). Empty functions cost nothing; none is timed as
/// attention. Tensors are views of host memory that end with the call.
struct Hooks {
  /// ids [Hi,t,K] of sparse layer `layer` for tokens first..first+t-1 (dense sessions have none).
  std::function<void(int layer, int64_t first, const TensorView& ids)> on_selection;
  /// May overwrite ids (teacher-forced lists) before they are used and before on_selection.
  std::function<void(int layer, int64_t first, const TensorView& ids)> force_selection;
  /// q_idx [t,Hi,Di] of a sparse layer and k_idx [first+t,Di], the index keys of the whole sequence
  /// so far, both normed and rotated: the block scores can be rebuilt from these.
  std::function<void(int layer, int64_t first, const TensorView& q_idx, const TensorView& k_idx)>
      on_index;
  /// logits f32 [t,vocab] of tokens first..first+t-1, in ascending pieces that cover all tokens.
  std::function<void(int64_t first, const TensorView& logits)> on_logits;
  /// -ln p of tokens first..first+n-1 given all before them, in ascending pieces that cover all
  /// tokens of the call but its first.
  std::function<void(int64_t first, std::span<const float> nats)> on_loss;
  /// After each layer of each chunk, in tokens (a layer counts as its share of the chunk);
  /// returning false stops extend() with kUnavailable "interrupted", the session as before the
  /// chunk.
  std::function<bool(int64_t done, int64_t total)> on_progress;
  /// Run index branch and attention of sparse layers apart, and time the former: Timings::index.
  bool time_index = false;
  /// Measure kept mass: mean of exp(lse_sparse - lse_dense) over heads and every 64th query that
  /// sees more than K blocks.
  bool kept_mass = false;
};

class Model;

/// One sequence: its paged KV and index caches.
class Session {
 public:
  /// Reserves caches for max_tokens. The model must outlive the session.
  static Status create(const Model& model, Attention attention, int64_t max_tokens,
                       std::unique_ptr<Session>* out);
  virtual ~Session() = default;

  /// Appends tokens (in chunks: memory stays flat beyond the caches). logits_last, when not empty,
  /// receives the vocab logits of the last token. Errors name a token id out of the vocabulary, a
  /// full cache, or (kNumeric) the layer and the first token that is no finite number.
  virtual Status extend(std::span<const int32_t> tokens, std::span<float> logits_last,
                        const Hooks& hooks = {}) = 0;
  virtual int64_t length() const = 0;
  virtual const Timings& timings() const = 0;
  /// One value per sparse layer, or empty when no query qualified or it was not asked for.
  virtual std::vector<double> kept_mass() const = 0;
};

class Model {
 public:
  /// Reads config.json and the safetensors shards of `directory`. Every name, dtype, shape and
  /// offset is checked, and that the weights are finite numbers.
  static Status load(const std::filesystem::path& directory, const LoadOptions& options,
                     std::unique_ptr<Model>* out);
  virtual ~Model() = default;
  virtual const Config& config() const = 0;
  virtual const LoadOptions& options() const = 0;
  virtual DType dtype() const = 0;               ///< of q, k, v and the caches
  virtual const char* backend_name() const = 0;  ///< of the attention operators
  virtual int threads() const = 0;
};

}  // namespace msa::model
