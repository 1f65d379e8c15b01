// Which rows go to which expert of a mixture of experts.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace msa::model {

/// Expert e has rows[begin[e]] .. rows[begin[e+1]-1], ascending.
struct Routing {
  std::vector<int64_t> begin;  ///< [E+1]
  std::vector<int32_t> rows;   ///< [rows * per_row]
  std::vector<float> weights;  ///< [rows * per_row], normalised over the experts of a row
};

/// Sigmoid router over logits [rows,E]: the per_row best of sigmoid + bias, ties to the lower
/// expert; weights are the sigmoids, normalised.
Routing route(std::span<const float> logits, std::span<const float> bias, int32_t per_row);

}  // namespace msa::model
