#include "skeleton_backend/skeleton.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/registry.h"

namespace msa {
namespace {

/// One row of `merge`: a = max lse_i; s = sum exp(lse_i - a); lse = a + ln s;
/// o = sum exp(lse_i - a) / s o_i. Precondition: f32 everywhere; the arguments passed check()
/// (core/check.h).
void merge_row(const MergeParams& m, int64_t t, int64_t h) {
  const int64_t parts = m.o_parts.shape[0], dim = m.o_parts.shape[3];
  constexpr float kNone = -std::numeric_limits<float>::infinity();

  float a = kNone;
  for (int64_t i = 0; i < parts; ++i) {
    const float lse = *m.lse_parts.at<float>(i, t, h);
    if (lse > a || std::isnan(lse)) a = lse;  // NaN stays
  }
  float sum = 0;
  if (a != kNone)
    for (int64_t i = 0; i < parts; ++i) sum += std::exp(*m.lse_parts.at<float>(i, t, h) - a);

  float* o = m.o.at<float>(t, h);
  std::fill_n(o, dim, 0.0f);
  for (int64_t i = 0; i < parts && a != kNone; ++i) {
    const float weight = std::exp(*m.lse_parts.at<float>(i, t, h) - a) / sum;
    if (weight == 0) continue;  // a part without keys may hold anything
    const float* part = m.o_parts.at<float>(i, t, h);
    for (int64_t d = 0; d < dim; ++d) o[d] += weight * part[d];
  }
  if (m.lse.given()) *m.lse.at<float>(t, h) = a == kNone ? kNone : a + std::log(sum);
}

Refusal fits(const Problem& p, const Limits&) {
  if (p.dtype != DType::kF32) return {"dtype", name_of(p.dtype), 0, "f32"};
  return {};
}

Status merge(const Plan&, const MergeParams& m, Workspace, Queue queue) {
  const int64_t heads = m.o_parts.shape[2];
  const auto row = [&](int64_t task, int) { merge_row(m, task / heads, task % heads); };
  const int64_t rows = m.o_parts.shape[1] * heads;
  if (queue.threads != nullptr) {
    queue.threads->parallel_for(rows, row);
  } else {
    for (int64_t task = 0; task < rows; ++task) row(task, 0);
  }
  return {};
}

constexpr Kernel kKernels[] = {
    {.op = Op::kMerge, .name = "skeleton", .fits = fits, .run = run_typed<MergeParams, merge>}};

constexpr Backend kBackend{.name = "skeleton",
                           .requirement = "any CPU",
                           .priority = -2,  // below the reference: only when asked for
                           .device = DeviceKind::kCPU,
                           .usable = [] { return Status(); },
                           .kernels = kKernels};

}  // namespace

const Backend* skeleton_backend() { return &kBackend; }

}  // namespace msa
