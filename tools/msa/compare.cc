#include "msa/compare.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/half.h"

namespace msa::cli {
namespace {

/// Errors that rounding and the order of sums explain, relative to 1 + |value|.
double tolerance(DType inputs) {
  switch (inputs) {
    case DType::kBF16:
      return 1e-2;  // probabilities and results rounded to 8 bits
    case DType::kF16:
      return 2e-3;
    default:
      return 1e-4;
  }
}

void fail(Verdict* verdict, const std::string& what) {
  if (verdict->ok()) verdict->failure = what;
}

/// Offset of the linear-th element of a strided view.
int64_t offset(const TensorView& view, int64_t linear) {
  int64_t sum = 0;
  for (size_t axis = static_cast<size_t>(view.rank); axis-- > 0;) {
    sum += linear % view.shape[axis] * view.stride[axis];
    linear /= view.shape[axis];
  }
  return sum;
}

}  // namespace

void Verdict::merge(const Verdict& other) {
  max_error = std::max(max_error, other.max_error);
  if (ok()) failure = other.failure;
}

void compare(const TensorView& actual, const TensorView& expected, DType inputs, Verdict* verdict) {
  for (int64_t i = 0; i < actual.numel(); ++i) {
    const int64_t at = offset(actual, i), from = offset(expected, i);
    if (actual.dtype == DType::kI32) {
      const int32_t a = static_cast<const int32_t*>(actual.data)[at];
      const int32_t e = static_cast<const int32_t*>(expected.data)[from];
      if (a != e) return fail(verdict, fmt::format("element {} is {}, expected {}", i, a, e));
      continue;
    }
    const double a = load_f32(actual.data, actual.dtype, at);
    const double e = load_f32(expected.data, expected.dtype, from);
    if (a == e || (std::isnan(a) && std::isnan(e))) continue;
    const double error = std::abs(a - e) / (1 + std::abs(e));
    if (!std::isfinite(error))
      return fail(verdict, fmt::format("element {} is {}, expected {}", i, a, e));
    verdict->max_error = std::max(verdict->max_error, error);
    if (error > tolerance(inputs))
      fail(verdict, fmt::format("element {} is {}, expected {}: error {:.2g} above {:.2g}", i, a, e,
                                error, tolerance(inputs)));
  }
}

void compare_bytes(const TensorView& actual, const TensorView& expected, Verdict* verdict) {
  const size_t bytes = static_cast<size_t>(actual.numel() * size_of(actual.dtype));
  if (bytes > 0 && std::memcmp(actual.data, expected.data, bytes) != 0)
    fail(verdict, "bytes differ from the reference's");
}

void compare_list(std::span<const int32_t> ids, std::span<const float> scores,
                  const Problem& problem, Verdict* verdict) {
  const size_t visible = scores.size();
  const size_t count = std::min(ids.size(), visible);
  std::vector<bool> taken(visible, false);
  for (size_t slot = 0; slot < ids.size(); ++slot) {
    const int32_t id = ids[slot];
    if (slot >= count
            ? id != -1
            : id < 0 || static_cast<size_t>(id) >= visible || (slot > 0 && id <= ids[slot - 1]))
      return fail(verdict,
                  fmt::format("slot {} names block {} of {} visible ones", slot, id, visible));
    if (slot < count) taken[static_cast<size_t>(id)] = true;
  }
  double worst_taken = std::numeric_limits<double>::infinity(), best_left = -worst_taken;
  for (size_t block = 0; block < visible; ++block) {
    const bool forced = block < static_cast<size_t>(problem.init_blocks) ||
                        block + static_cast<size_t>(problem.local_blocks) >= visible;
    if (forced && !taken[block])
      return fail(verdict, fmt::format("forced block {} is missing", block));
    const double score = std::isnan(scores[block]) ? -INFINITY : scores[block];
    if (!taken[block]) best_left = std::max(best_left, score);
    if (taken[block] && !forced) worst_taken = std::min(worst_taken, score);
  }
  if (!(best_left > worst_taken)) return;
  const double gap = (best_left - worst_taken) / (1 + std::abs(best_left));
  verdict->max_error = std::max(verdict->max_error, gap);
  if (!(gap <= tolerance(problem.dtype)))
    fail(verdict,
         fmt::format("a block of score {} was left out for one of {}", best_left, worst_taken));
}

}  // namespace msa::cli
