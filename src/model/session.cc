// The layers of the model, applied chunk by chunk to one sequence.
#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "core/text.h"
#include "model/attention.h"
#include "model/host_view.h"
#include "model/loaded_model.h"
#include "model/routing.h"
#include "model/stopwatch.h"

namespace msa::model {
namespace {

// Logits exist for as many rows at once as fit into this many floats.
constexpr int64_t kMaxLogits = int64_t{1} << 22;
constexpr int64_t kMaxTokens = int64_t{1} << 30;

Status check_logits(int64_t token, std::span<const float> logits) {
  const auto bad = std::ranges::find_if(logits, [](float x) { return !std::isfinite(x); });
  if (bad == logits.end()) return {};
  return error(StatusCode::kNumeric, "head, token ", token, ": its logit ", bad - logits.begin(),
               " is ", *bad);
}

class ModelSession final : public Session {
 public:
  explicit ModelSession(const LoadedModel& model)
      : compute_(model.compute()), config_(model.config()), weights_(model.weights()) {}

  Status create(const LoadedModel& model, Attention kind, int64_t max_tokens);
  Status extend(std::span<const int32_t> tokens, std::span<float> logits_last,
                const Hooks& hooks) override;
  int64_t length() const override { return length_; }
  const Timings& timings() const override { return timings_; }
  std::vector<double> kept_mass() const override { return attention_.kept_mass(); }

 private:
  Status check(std::span<const int32_t> tokens, std::span<float> logits_last) const;
  Status extend_timed(std::span<const int32_t> tokens, std::span<float> logits_last,
                      const Hooks& hooks);
  Status forward(std::span<const int32_t> tokens, int64_t done, int64_t total, const Hooks& hooks);
  Status run_layers(std::span<const int32_t> tokens, int64_t done, int64_t total,
                    const Hooks& hooks);
  Status attend(size_t layer, int64_t rows, const Hooks& hooks);
  void mlp(const LayerWeights& layer, bool is_moe, int64_t rows);
  void gated(const MlpWeights& weights, const float* x, int64_t rows, float* y);
  void experts(const MoeWeights& weights, int64_t rows);
  Status head(int64_t rows, std::span<const int32_t> next, const Hooks& hooks);
  Status last_logits(int64_t rows, std::span<float> logits_last);
  void add_norm(size_t layer, const char* what, const Norm& norm, const float* delta, int64_t rows);
  double hook_seconds() const { return hook_seconds_ + attention_.untimed_seconds(); }

  Compute& compute_;
  const Config& config_;
  const Weights& weights_;
  DType dtype_ = DType::kF32;
  int64_t max_tokens_ = 0;
  int64_t max_chunk_ = 0;
  int64_t length_ = 0;
  SequenceAttention attention_;
  Timings timings_;
  double hook_seconds_ = 0;

  struct Normed {
    size_t layer;
    const char* what;
  };
  std::vector<Normed> norms_;  // whose output each norm of the chunk reads

  // Activations of one chunk; t rows each.
  Buffer x_;                          // [t,H] the residual stream
  Buffer normed_;                     // [t,H]
  Buffer delta_;                      // [t,H] what the last block adds to x
  Buffer wide_;                       // [t,max(Hq D, ...)] projections before their norm; then o
  Buffer q_, k_, v_, q_idx_, k_idx_;  // in dtype
  Buffer turns_;                      // [t,rotary_dim]
  Buffer gate_up_, gated_;            // [t,2I], [t,I]
  Buffer router_;                     // [t,E]
  Buffer expert_in_, expert_out_;     // [t,H]
  Buffer logits_;                     // [pieces of t,vocab]
};

Status ModelSession::create(const LoadedModel& model, Attention kind, int64_t max_tokens) {
  if (max_tokens < 1 || max_tokens > kMaxTokens)
    return invalid("max_tokens: got ", max_tokens, ", expected 1 to ", kMaxTokens);
  dtype_ = model.dtype();
  max_tokens_ = max_tokens;
  max_chunk_ = std::min(compute_.chunk_rows(), max_tokens);
  MSA_TRY(attention_.create(compute_, model, kind, max_tokens, max_chunk_));
  timings_.attention.assign(config_.layers.size(), 0);
  timings_.index.assign(config_.layers.size(), 0);

  const auto floats = [&](int64_t columns, Buffer* out) {
    return Buffer::create(compute_, max_chunk_ * columns * size_of(DType::kF32), out);
  };
  const auto elements = [&](int64_t columns, Buffer* out) {
    return Buffer::create(compute_, max_chunk_ * columns * size_of(dtype_), out);
  };
  const int64_t hidden = config_.hidden_size;
  const int64_t wide_q = int64_t{config_.heads_q} * config_.head_dim;
  const int64_t wide_kv = int64_t{config_.heads_kv} * config_.head_dim;
  const int64_t wide_index = int64_t{config_.heads_kv} * config_.index_dim;
  const int64_t inner = std::max(
      {config_.dense_intermediate, config_.expert_intermediate, config_.shared_intermediate});
  MSA_TRY(floats(hidden, &x_));
  MSA_TRY(floats(hidden, &normed_));
  MSA_TRY(floats(hidden, &delta_));
  MSA_TRY(floats(std::max(wide_q, wide_index), &wide_));
  MSA_TRY(elements(wide_q, &q_));
  MSA_TRY(elements(wide_kv, &k_));
  MSA_TRY(elements(wide_kv, &v_));
  MSA_TRY(elements(wide_index, &q_idx_));
  MSA_TRY(elements(config_.index_dim, &k_idx_));
  MSA_TRY(floats(config_.rotary_dim, &turns_));
  MSA_TRY(floats(2 * inner, &gate_up_));
  MSA_TRY(floats(inner, &gated_));
  if (config_.has_moe()) {
    MSA_TRY(floats(config_.experts, &router_));
    MSA_TRY(floats(hidden, &expert_in_));
    MSA_TRY(floats(hidden, &expert_out_));
  }
  const int64_t logits =
      std::min(max_chunk_ * config_.vocab_size, std::max(kMaxLogits, config_.vocab_size));
  return Buffer::create(compute_, logits * size_of(DType::kF32), &logits_);
}

Status ModelSession::check(std::span<const int32_t> tokens, std::span<float> logits_last) const {
  const auto count = static_cast<int64_t>(tokens.size());
  if (count > max_tokens_ - length_)
    return invalid("tokens: got ", count, " more, but the cache of ", max_tokens_, " holds ",
                   length_, " already");
  for (size_t i = 0; i < tokens.size(); ++i)
    if (tokens[i] < 0 || tokens[i] >= config_.vocab_size)
      return invalid("tokens[", i, "]: got ", tokens[i], ", expected an id below vocab_size (",
                     config_.vocab_size, ")");
  if (!logits_last.empty() && static_cast<int64_t>(logits_last.size()) != config_.vocab_size)
    return invalid("logits_last: got ", logits_last.size(), " values, expected vocab_size (",
                   config_.vocab_size, ")");
  return {};
}

Status ModelSession::extend(std::span<const int32_t> tokens, std::span<float> logits_last,
                            const Hooks& hooks) {
  MSA_TRY(check(tokens, logits_last));
  double elapsed = 0;
  const double hooks_before = hook_seconds();
  Status status;
  {
    const Stopwatch timer(&elapsed);
    status = extend_timed(tokens, logits_last, hooks);
  }
  timings_.total += elapsed - (hook_seconds() - hooks_before);
  timings_.attention = attention_.seconds();
  timings_.index = attention_.index_seconds();
  return status;
}

Status ModelSession::extend_timed(std::span<const int32_t> tokens, std::span<float> logits_last,
                                  const Hooks& hooks) {
  const auto total = static_cast<int64_t>(tokens.size());
  for (int64_t done = 0; done < total;) {
    const int64_t rows = std::min(max_chunk_, total - done);
    const auto chunk = tokens.subspan(static_cast<size_t>(done), static_cast<size_t>(rows));
    MSA_TRY(forward(chunk, done, total, hooks));
    MSA_TRY(head(rows, tokens.subspan(static_cast<size_t>(done) + 1), hooks));
    done += rows;
    if (done == total && !logits_last.empty()) MSA_TRY(last_logits(rows, logits_last));
    length_ += rows;
  }
  return compute_.wait();
}

// All layers over one chunk; leaves normed_ ready for the head. A row that is no finite number
// anywhere stays so in the residual stream or passes a norm of a head on its way there, so the
// norms see it; the head's products are checked where they are handed out.
Status ModelSession::forward(std::span<const int32_t> tokens, int64_t done, int64_t total,
                             const Hooks& hooks) {
  norms_.clear();
  Status status = run_layers(tokens, done, total, hooks);
  const std::optional<BadRow> bad = compute_.bad_row();
  if (!status.ok() || !bad) return status;
  const Normed& from = norms_[static_cast<size_t>(bad->call)];
  return error(StatusCode::kNumeric, "layer ", from.layer, ", token ", length_ + bad->row, ": its ",
               from.what, " holds NaN, infinity or a number too large to square");
}

Status ModelSession::run_layers(std::span<const int32_t> tokens, int64_t done, int64_t total,
                                const Hooks& hooks) {
  const auto rows = static_cast<int64_t>(tokens.size());
  const auto layers = static_cast<int64_t>(config_.layers.size());
  compute_.rope_angles(length_, rows, config_.rotary_dim, config_.rope_theta, turns_.f32());
  compute_.embed(weights_.embedding, tokens, config_.hidden_size, x_.f32());
  add_norm(0, "embedding", weights_.layers[0].input_norm, nullptr, rows);
  for (int64_t i = 0; i < layers; ++i) {
    const auto layer = static_cast<size_t>(i);
    const LayerWeights& weights = weights_.layers[layer];
    MSA_TRY(attend(layer, rows, hooks));
    add_norm(layer, "attention", weights.mlp_norm, delta_.f32(), rows);
    mlp(weights, config_.layers[layer].moe, rows);
    add_norm(layer, "MLP", i + 1 < layers ? weights_.layers[layer + 1].input_norm : weights_.norm,
             delta_.f32(), rows);
    if (hooks.on_progress && !hooks.on_progress(done + rows * (i + 1) / layers, total))
      return error(StatusCode::kUnavailable, "interrupted");
  }
  return {};
}

// x_ += delta, normed_ = norm(x_). `what` of `layer` made delta.
void ModelSession::add_norm(size_t layer, const char* what, const Norm& norm, const float* delta,
                            int64_t rows) {
  norms_.push_back({layer, what});
  compute_.add_norm(norm, x_.f32(), delta, rows, normed_.f32());
}

// delta_ = attention of normed_.
Status ModelSession::attend(size_t layer, int64_t rows, const Hooks& hooks) {
  const LayerWeights& weights = weights_.layers[layer];
  const auto project = [&](const char* what, const Matrix& w, const Norm& norm, int64_t heads,
                           void* out) {
    norms_.push_back({layer, what});
    compute_.matmul(w, normed_.f32(), rows, wide_.f32());
    compute_.norm_rope(norm, wide_.f32(), rows, heads, turns_.f32(), config_.rotary_dim, out,
                       dtype_);
  };
  project("q", *weights.q, weights.q_norm, config_.heads_q, q_.data());
  project("k", *weights.k, weights.k_norm, config_.heads_kv, k_.data());
  compute_.matmul(*weights.v, normed_.f32(), rows, wide_.f32());
  compute_.convert(wide_.f32(), rows * weights.v->rows(), v_.data(), dtype_);
  SequenceAttention::Chunk chunk{.layer = static_cast<int>(layer),
                                 .first = length_,
                                 .tokens = rows,
                                 .q = q_.data(),
                                 .k = k_.data(),
                                 .v = v_.data(),
                                 .o = wide_.f32()};
  if (attention_.selects(chunk.layer)) {
    project("index q", *weights.index_q, weights.index_q_norm, config_.heads_kv, q_idx_.data());
    project("index k", *weights.index_k, weights.index_k_norm, 1, k_idx_.data());
    chunk.q_idx = q_idx_.data();
    chunk.k_idx = k_idx_.data();
  }
  MSA_TRY(attention_.run(chunk, hooks));
  compute_.matmul(*weights.o, wide_.f32(), rows, delta_.f32());
  return {};
}

// delta_ = MLP of normed_.
void ModelSession::mlp(const LayerWeights& layer, bool is_moe, int64_t rows) {
  gated(is_moe ? layer.moe.shared : layer.mlp, normed_.f32(), rows, delta_.f32());
  if (is_moe) experts(layer.moe, rows);
}

void ModelSession::gated(const MlpWeights& weights, const float* x, int64_t rows, float* y) {
  compute_.matmul(*weights.gate_up, x, rows, gate_up_.f32());
  compute_.swiglu(gate_up_.f32(), rows, weights.down->columns(),
                  static_cast<float>(config_.swiglu_alpha),
                  static_cast<float>(config_.swiglu_limit), gated_.f32());
  compute_.matmul(*weights.down, gated_.f32(), rows, y);
}

// delta_ += the routed experts of normed_, each over the rows that chose it.
void ModelSession::experts(const MoeWeights& weights, int64_t rows) {
  const int64_t hidden = config_.hidden_size;
  compute_.matmul(*weights.router, normed_.f32(), rows, router_.f32());
  std::vector<float> logits(static_cast<size_t>(rows * config_.experts));
  compute_.copy(logits.data(), router_.data(), static_cast<int64_t>(logits.size() * sizeof(float)));
  const Routing routing = route(logits, weights.bias, config_.experts_per_token);
  for (size_t e = 0; e < weights.experts.size(); ++e) {
    const auto begin = static_cast<size_t>(routing.begin[e]);
    const auto count = static_cast<size_t>(routing.begin[e + 1]) - begin;
    if (count == 0) continue;
    const auto mine = std::span<const int32_t>(routing.rows).subspan(begin, count);
    compute_.gather(normed_.f32(), mine, hidden, expert_in_.f32());
    gated(weights.experts[e], expert_in_.f32(), static_cast<int64_t>(count), expert_out_.f32());
    compute_.scatter_add(expert_out_.f32(), mine,
                         std::span<const float>(routing.weights).subspan(begin, count),
                         static_cast<float>(config_.routed_scaling), hidden, delta_.f32());
  }
}

// The hooks that want logits get them piece by piece. `next`: the tokens behind the chunk's first.
Status ModelSession::head(int64_t rows, std::span<const int32_t> next, const Hooks& hooks) {
  if (!hooks.on_logits && !hooks.on_loss) return {};
  const auto known = std::min(rows, static_cast<int64_t>(next.size()));  // rows with a successor
  const int64_t vocab = config_.vocab_size;
  const int64_t piece = std::min(rows, logits_.bytes() / (vocab * size_of(DType::kF32)));
  std::vector<float> nats;
  for (int64_t row = 0; row < rows; row += piece) {
    const int64_t count = std::min(piece, rows - row);
    compute_.matmul(*weights_.head, normed_.f32() + row * config_.hidden_size, count,
                    logits_.f32());
    const int64_t scored = hooks.on_loss ? std::clamp<int64_t>(known - row, 0, count) : 0;
    nats.resize(static_cast<size_t>(scored));
    if (scored > 0)
      compute_.cross_entropy(logits_.f32(), next.subspan(static_cast<size_t>(row), nats.size()),
                             vocab, nats.data());
    for (size_t i = 0; i < nats.size(); ++i)
      if (!std::isfinite(nats[i]))
        return error(StatusCode::kNumeric, "head, token ", length_ + row + static_cast<int64_t>(i),
                     ": its loss is ", nats[i]);
    const Stopwatch timer(&hook_seconds_);
    if (scored > 0) hooks.on_loss(length_ + row + 1, nats);
    if (!hooks.on_logits) continue;
    TensorView logits = TensorView::contiguous(logits_.data(), DType::kF32, {count, vocab});
    logits.device = compute_.device();
    const HostView view(compute_, logits);
    for (int64_t i = 0; i < count; ++i)
      MSA_TRY(check_logits(length_ + row + i,
                           {view.view().at<const float>(i), static_cast<size_t>(vocab)}));
    hooks.on_logits(length_ + row, view.view());
  }
  return {};
}

Status ModelSession::last_logits(int64_t rows, std::span<float> logits_last) {
  compute_.matmul(*weights_.head, normed_.f32() + (rows - 1) * config_.hidden_size, 1,
                  logits_.f32());
  compute_.copy(logits_last.data(), logits_.data(), config_.vocab_size * size_of(DType::kF32));
  return check_logits(length_ + rows - 1, logits_last);
}

}  // namespace

Status Session::create(const Model& model, Attention attention, int64_t max_tokens,
                       std::unique_ptr<Session>* out) {
  const auto& loaded = static_cast<const LoadedModel&>(model);
  auto session = std::make_unique<ModelSession>(loaded);
  MSA_TRY(session->create(loaded, attention, max_tokens));
  *out = std::move(session);
  return {};
}

}  // namespace msa::model
