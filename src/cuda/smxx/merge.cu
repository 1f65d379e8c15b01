// Merging partial results: a warp per query row and head.
#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"

namespace msa::cuda::plain {
namespace {

struct Merge {
  Tensor o_parts;    ///< [parts,T,Hq,D]
  Tensor lse_parts;  ///< f32 [parts,T,Hq]
  Tensor o;          ///< [T,Hq,D]
  Tensor lse;        ///< f32 [T,Hq], or not given
  int parts, tokens, heads, dim;
};

__global__ void __launch_bounds__(128) merge_kernel(Merge a) {
  const int64_t row = int64_t{blockIdx.x} * warps() + warp();
  if (row >= int64_t{a.tokens} * a.heads) return;
  const int t = static_cast<int>(row / a.heads), h = static_cast<int>(row % a.heads);
  const auto part_lse = [&](int i) { return a.lse_parts.at<const float>(i, t, h); };

  float max = -infinity();
  for (int i = 0; i < a.parts; ++i) max = fmaxf(max, part_lse(i));
  const bool empty = max == -infinity();
  float sum = 0;
  for (int i = 0; i < a.parts && !empty; ++i) sum += expf(part_lse(i) - max);

  with_elements(a.o_parts.data, a.o_parts.dtype, [&](const auto* elements) {
    for (int d = lane(); d < a.dim; d += 32) {
      float o = 0;
      for (int i = 0; i < a.parts; ++i) {
        if (part_lse(i) == -infinity()) continue;  // its o may hold anything
        o += expf(part_lse(i) - max) / sum * to_float(elements[a.o_parts.offset(i, t, h, d)]);
      }
      store(a.o, a.o.offset(t, h, d), o);
    }
  });
  if (lane() == 0 && a.lse.data != nullptr)
    a.lse.at<float>(t, h) = empty ? -infinity() : max + logf(sum);
}

}  // namespace

template <>
Status run(const Plan& plan, const MergeParams& a, Workspace, cudaStream_t stream) {
  constexpr int64_t kWarps = 4;
  const Problem& p = plan.problem;
  const int64_t tokens = a.o_parts.shape[1];
  const LaunchShape shape{.grid = dim3(static_cast<uint32_t>(ceil_div(tokens * p.heads_q, kWarps))),
                          .block = dim3(32 * kWarps)};
  return launch("merge", merge_kernel, shape, stream,
                Merge{.o_parts = tensor(a.o_parts),
                      .lse_parts = tensor(a.lse_parts),
                      .o = tensor(a.o),
                      .lse = tensor(a.lse),
                      .parts = static_cast<int>(a.o_parts.shape[0]),
                      .tokens = static_cast<int>(tokens),
                      .heads = p.heads_q,
                      .dim = p.head_dim});
}

}  // namespace msa::cuda::plain
