// The attention of one sequence: its paged caches and the public operators, nothing else.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

#include "model/compute.h"
#include "model/model.h"

namespace msa::model {

/// The operator problem of a model's attention.
Problem attention_problem(const Config& config, DType dtype, Device device, Op op);

class SequenceAttention {
 public:
  /// One chunk of a layer, ready for attention: normed, rotated, in the session's dtype.
  struct Chunk {
    int layer = 0;
    int64_t first = 0;      ///< position of the first token
    int64_t tokens = 0;     ///< t
    void* q = nullptr;      ///< [t,Hq,D]
    void* k = nullptr;      ///< [t,Hkv,D]
    void* v = nullptr;      ///< [t,Hkv,D]
    void* q_idx = nullptr;  ///< [t,Hi,Di], null where the layer needs no selection
    void* k_idx = nullptr;  ///< [t,Di], likewise
    float* o = nullptr;     ///< out [t,Hq,D]
  };

  /// Reserves caches for max_tokens and plans for chunks of up to max_chunk.
  Status create(Compute& compute, const Model& model, Attention kind, int64_t max_tokens,
                int64_t max_chunk);

  /// True when the layer selects blocks; with Attention::kDense none does.
  bool selects(int layer) const;
  /// Appends the chunk's keys and values to the caches and attends.
  Status run(const Chunk& chunk, const Hooks& hooks);

  const std::vector<double>& seconds() const { return attention_seconds_; }
  const std::vector<double>& index_seconds() const { return index_seconds_; }
  double untimed_seconds() const { return untimed_seconds_; }  ///< hooks and kept mass
  std::vector<double> kept_mass() const;

 private:
  struct Cache {
    Buffer k, v, k_idx;
  };
  /// Of a sparse layer, and of its steps apart.
  struct LayerPlans {
    Plan layer{}, select{}, attend{};
  };
  struct Mass {
    double sum = 0;
    int64_t count = 0;
  };

  const LayerPlans& plans(const Chunk& chunk) const {
    return chunk.tokens <= kDecodeTokens ? step_ : chunk_;
  }
  Status plan(Op op, int64_t max_batch, int64_t max_seqlen_q, Plan* out);
  Status append(const Chunk& chunk);
  Status attend_dense(const Chunk& chunk);
  Status attend_selected(const Chunk& chunk, const Hooks& hooks);
  /// The two steps of a layer, with the hooks between them.
  Status attend_apart(const SparseAttentionParams& attend, const Chunk& chunk, const Hooks& hooks);
  Status measure_kept_mass(const Chunk& chunk);
  void call_selection_hooks(const Chunk& chunk, const Hooks& hooks, const TensorView& ids);

  /// Contiguous device memory.
  TensorView tensor(void* data, DType dtype, std::initializer_list<int64_t> shape) const;
  TensorView ints(const Buffer& buffer, int64_t offset, int64_t count) const;
  TensorView rows(void* data, int64_t tokens, int64_t heads, int64_t dim) const;
  TensorView pages(const Buffer& pool) const;        ///< [P,Hkv,Bk,D]
  TensorView index_pages(const Buffer& pool) const;  ///< [P,Bk,Di]
  Batch batch(const Chunk& chunk);
  template <class Params>
  Status run_operator(const Plan& plan, const Params& params);
  /// The same, and adds its seconds to *seconds.
  template <class Params>
  Status time_operator(const Plan& plan, const Params& params, double* seconds);

  Compute* compute_ = nullptr;
  const Config* config_ = nullptr;
  DType dtype_ = DType::kF32;
  std::string backend_;
  Attention kind_ = Attention::kDense;
  int64_t page_count_ = 0;

  Plan append_{}, dense_{}, probe_{};
  LayerPlans chunk_, step_;  ///< for any chunk, for up to kDecodeTokens
  Buffer workspace_;
  std::vector<Cache> caches_;  ///< per layer
  Buffer page_table_;          ///< i32 [P]: page j holds block j
  Buffer lengths_;             ///< i32 [3]: cu_seqlens_q [2], seq_lens [1]
  Buffer ids_;                 ///< i32 [Hkv,chunk,K]
  Buffer lse_;                 ///< f32 [chunk,Hq]
  Buffer probe_lengths_;       ///< i32: cu_seqlens_q [probes+1], seq_lens [probes]
  Buffer probe_o_, probe_lse_;

  std::vector<double> attention_seconds_, index_seconds_;
  double untimed_seconds_ = 0;
  std::vector<Mass> mass_;
};

}  // namespace msa::model
