#include "model/sampler.h"

#include <algorithm>
#include <cmath>

#include "core/text.h"

namespace msa::model {

Status Sampler::create(const SamplerOptions& options, Sampler* out) {
  if (!(options.temperature >= 0) || std::isinf(options.temperature))
    return invalid("temperature: got ", options.temperature, ", expected a number >= 0");
  if (options.top_k < 0) return invalid("top_k: got ", options.top_k, ", expected >= 0");
  if (!(options.top_p > 0 && options.top_p <= 1))
    return invalid("top_p: got ", options.top_p, ", expected a number in (0, 1]");
  out->options_ = options;
  out->state_ = options.seed;
  return {};
}

int32_t Sampler::sample(std::span<const float> logits) {
  candidates_.clear();
  for (size_t i = 0; i < logits.size(); ++i)
    if (!std::isnan(logits[i]))
      candidates_.push_back({static_cast<int32_t>(i), static_cast<double>(logits[i])});
  if (candidates_.empty()) return 0;

  // Best first, as many as may be needed.
  size_t kept = candidates_.size();
  if (options_.temperature == 0) kept = 1;
  if (options_.top_k > 0) kept = std::min(kept, static_cast<size_t>(options_.top_k));
  const auto better = [](const Candidate& a, const Candidate& b) {
    return a.weight > b.weight || (a.weight == b.weight && a.token < b.token);
  };
  std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<std::ptrdiff_t>(kept),
                    candidates_.end(), better);
  candidates_.resize(kept);
  if (kept == 1) return candidates_[0].token;

  const double top = candidates_[0].weight;
  if (std::isinf(top)) return candidates_[0].token;
  double sum = 0;
  for (Candidate& candidate : candidates_) {
    candidate.weight =
        std::exp((candidate.weight - top) / static_cast<double>(options_.temperature));
    sum += candidate.weight;
  }
  double nucleus = 0;
  size_t count = 0;
  while (count < kept && (count == 0 || nucleus < static_cast<double>(options_.top_p) * sum))
    nucleus += candidates_[count++].weight;

  double point = uniform() * nucleus;
  for (size_t i = 0; i + 1 < count; ++i) {
    if (point < candidates_[i].weight) return candidates_[i].token;
    point -= candidates_[i].weight;
  }
  return candidates_[count - 1].token;
}

// splitmix64: one addition and a mix of the bits.
double Sampler::uniform() {
  state_ += 0x9e3779b97f4a7c15u;
  uint64_t z = state_;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  z ^= z >> 31;
  return static_cast<double>(z >> 11) * 0x1p-53;
}

}  // namespace msa::model
