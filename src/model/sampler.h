// Choosing the next token from logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "msa/status.h"

namespace msa::model {

struct SamplerOptions {
  float temperature = 0;  ///< 0 = greedy
  int32_t top_k = 0;      ///< keep the k most likely tokens; 0 = all
  float top_p = 1;        ///< then the fewest whose probabilities reach p, at least one
  uint64_t seed = 0;
};

/// Draws tokens. The same options and logits give the same tokens on every machine.
class Sampler {
 public:
  /// Errors: temperature < 0, top_k < 0, top_p outside (0, 1].
  static Status create(const SamplerOptions& options, Sampler* out);

  /// Ties go to the lower id; NaN logits are never chosen. Precondition: logits is not empty.
  int32_t sample(std::span<const float> logits);

 private:
  struct Candidate {
    int32_t token;
    double weight;  ///< the logit, then its share
  };
  double uniform();  ///< in [0, 1)

  SamplerOptions options_;
  uint64_t state_ = 0;
  std::vector<Candidate> candidates_;
};

}  // namespace msa::model
