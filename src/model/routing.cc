#include "model/routing.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

namespace msa::model {

Routing route(std::span<const float> logits, std::span<const float> bias, int32_t per_row) {
  const size_t experts = bias.size();
  const auto chosen = static_cast<size_t>(per_row);
  std::vector<std::vector<std::pair<int32_t, float>>> lists(experts);  // (row, weight)
  std::vector<float> gates(experts);
  std::vector<size_t> order(experts);
  for (size_t row = 0; row < logits.size() / experts; ++row) {
    const std::span<const float> line = logits.subspan(row * experts, experts);
    for (size_t e = 0; e < experts; ++e) gates[e] = 1.0f / (1.0f + std::exp(-line[e]));
    std::iota(order.begin(), order.end(), size_t{0});
    const auto better = [&](size_t a, size_t b) {
      const float x = gates[a] + bias[a], y = gates[b] + bias[b];
      return x > y || (x == y && a < b);
    };
    std::partial_sort(order.begin(), order.begin() + per_row, order.end(), better);
    float sum = 0;
    for (size_t i = 0; i < chosen; ++i) sum += gates[order[i]];
    for (size_t i = 0; i < chosen; ++i)
      lists[order[i]].emplace_back(static_cast<int32_t>(row), gates[order[i]] / sum);
  }
  Routing out;
  out.begin.push_back(0);
  for (const auto& list : lists) {
    for (const auto& [row, weight] : list) {
      out.rows.push_back(row);
      out.weights.push_back(weight);
    }
    out.begin.push_back(static_cast<int64_t>(out.rows.size()));
  }
  return out;
}

}  // namespace msa::model
