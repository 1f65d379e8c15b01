#include "cuda/sm90/index/family.h"

#include <algorithm>
#include <bit>

#include "cuda/kernel.h"
#include "cuda/launch.h"
#include "cuda/sm90/index/best_blocks.cuh"
#include "cuda/sm90/index/score_blocks.cuh"
#include "cuda/sm90/index/score_matrix.cuh"
#include "cuda/sm90/index/select_rows.cuh"
#include "cuda/tensor_map.h"

namespace msa::cuda::sm90::index {
namespace {

/// Columns of the workspace's scores.
int64_t max_blocks(const Limits& limits) { return ceil_div(limits.max_seqlen_k, int64_t{kBlock}); }

/// Both operators that multiply, ready but for their output.
Status score_arguments(const Plan& plan, const TensorView& q_idx, const TensorView& k_idx,
                       const Batch& batch, ScoreArguments* out) {
  const Problem& p = plan.problem;
  const bool narrow = is_narrow(p, plan.limits);
  const int tile_rows = narrow ? NarrowTile::kRows : WideTile::kRows;
  const int warpgroup_rows = narrow ? NarrowTile::kWarpgroupRows : WideTile::kWarpgroupRows;
  MSA_TRY(map_queries("q_idx", q_idx, p.heads_kv, warpgroup_rows / p.heads_kv, &out->q));
  MSA_TRY(map_keys("k_idx", k_idx, p.layout, kBlock, &out->k));
  out->grid.batch = device_batch(batch, q_idx.shape[0], k_idx, p.block_size);
  out->grid.selection = selection_of(p);
  out->grid.head_shift = std::countr_zero(static_cast<uint32_t>(p.heads_kv));
  out->grid.max_blocks = INT32_MAX;
  out->grid.splits = narrow ? 1 : splits(p, plan.limits);
  out->grid.tiles = static_cast<int32_t>(
      tile_numbers(q_idx.shape[0], out->grid.batch.sequences, tile_rows / p.heads_kv));
  return {};
}

template <class Shape, class Schedule, class Sink>
Status launch_scores(uint32_t ctas, const ScoreArguments& a, cudaStream_t stream) {
  return launch(
      "index: score_blocks", score_blocks<Shape, Schedule, Sink>,
      {.grid = ctas, .block = Shape::kThreads, .shared_bytes = sizeof(ScoreShared<Shape, Sink>)},
      stream, a);
}

/// Every score to its own place, so that parts of a tile have nothing to merge.
Status launch_matrix(const Plan& plan, const ScoreArguments& a, cudaStream_t stream) {
  if (is_narrow(plan.problem, plan.limits)) {
    return launch_scores<NarrowTile, EqualShares<NarrowTile::kRows>, ScoreMatrix<NarrowTile>>(
        kSMs, a, stream);
  }
  return launch_scores<WideTile, OneTile<WideTile::kRows>, ScoreMatrix<WideTile>>(
      static_cast<uint32_t>(a.grid.tiles * a.grid.splits), a, stream);
}

/// A CTA per row while there are few: the latency of one row counts then. `kPerLane`: scores that a
/// lane holds when a warp has a row of its own.
template <int kPerLane, class Rows>
Status launch_selection(const Rows& rows, const Chosen& out, cudaStream_t stream) {
  constexpr int kFew = 8 * kSMs, kWarps = 8, kTogetherPerLane = 16;
  const auto heads = static_cast<uint32_t>(out.heads), tokens = static_cast<uint32_t>(out.tokens);
  if (out.heads * int64_t{out.tokens} <= kFew) {
    return launch("index: select_rows", select_rows<Rows, kWarps, kTogetherPerLane, true>,
                  {.grid = dim3(tokens, heads), .block = 32 * kWarps, .overlap = true}, stream,
                  rows, out);
  }
  return launch("index: select_rows", select_rows<Rows, kWarps, kPerLane, false>,
                {.grid = dim3(ceil_div(tokens, uint32_t{kWarps}), heads),
                 .block = 32 * kWarps,
                 .overlap = true},
                stream, rows, out);
}

Chosen chosen(const Problem& p, const TensorView& ids, const TensorView& scores) {
  return {.ids = rows<int32_t>(ids, 1),
          .scores = rows<float>(scores, 1),
          .heads = p.heads_kv,
          .tokens = static_cast<int32_t>(ids.shape[1]),
          .topk = p.topk};
}

}  // namespace

int64_t workspace_bytes(const Problem& p, const Limits& limits) {
  if (p.op != Op::kIndexSelect) return 0;
  if (keeps_scores(p, limits)) return score_bytes(p, limits);
  const int parts = splits(p, limits);
  if (parts == 1) return 0;
  const int queries = WideTile::kRows / p.heads_kv;
  return tile_numbers(limits.max_tokens, limits.max_batch, queries) * WideTile::kRows * parts *
         kList * int64_t{sizeof(Entry)};
}

Status run(const Plan& plan, const IndexScoresParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  ScoreArguments args{};
  if (a.scores.numel() == 0) return {};
  MSA_TRY(score_arguments(plan, a.q_idx, a.k_idx, a.batch, &args));
  args.grid.selection = {
      .topk = 1, .init_blocks = 0, .local_blocks = 0};  // every block has a score
  args.grid.max_blocks = static_cast<int32_t>(a.scores.shape[2]);
  args.out.scores = rows<float>(a.scores, 1);
  args.out.block_stride = a.scores.stride[2];
  const int64_t rows = int64_t{p.heads_kv} * args.grid.batch.tokens;
  MSA_TRY(launch("index: clear_unseen", clear_unseen,
                 {.grid = static_cast<uint32_t>(ceil_div(rows, int64_t{kClearWarps})),
                  .block = 32 * kClearWarps},
                 stream, args.grid, args.out));
  return launch_matrix(plan, args, stream);
}

Status run(const Plan& plan, const IndexSelectParams& a, Workspace workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  ScoreArguments args{};
  const Chosen out = chosen(p, a.block_ids, a.scores);
  if (out.tokens == 0) return {};
  MSA_TRY(score_arguments(plan, a.q_idx, a.k_idx, a.batch, &args));
  if (keeps_scores(p, plan.limits)) {
    args.grid.max_blocks = static_cast<int32_t>(max_blocks(plan.limits));
    args.out.scores = {.data = static_cast<float*>(workspace.data),
                       .token = int64_t{p.heads_kv} * args.grid.max_blocks,
                       .head = args.grid.max_blocks};
    args.out.block_stride = 1;
    MSA_TRY(launch_matrix(plan, args, stream));
    return launch_selection<32>(BatchScores{.batch = args.grid.batch,
                                            .selection = args.grid.selection,
                                            .scores = args.out.scores.data,
                                            .heads = p.heads_kv,
                                            .max_blocks = args.grid.max_blocks},
                                out, stream);
  }
  args.out.ids = out.ids;
  args.out.scores = out.scores;
  if (args.grid.splits > 1) args.out.lists = static_cast<Entry*>(workspace.data);
  MSA_TRY((launch_scores<WideTile, OneTile<WideTile::kRows>, BestBlocks<WideTile>>(
      static_cast<uint32_t>(args.grid.tiles * args.grid.splits), args, stream)));
  if (args.grid.splits == 1) return {};
  return launch_selection<8>(BatchLists{.batch = args.grid.batch,
                                        .selection = args.grid.selection,
                                        .lists = args.out.lists,
                                        .heads = p.heads_kv,
                                        .splits = args.grid.splits,
                                        .rows = WideTile::kRows},
                             out, stream);
}

Status run(const Plan& plan, const SelectBlocksParams& a, Workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  return launch_selection<32>(
      GivenScores{.selection = selection_of(p),
                  .scores = rows<const float>(a.scores, 1),
                  .block_stride = a.scores.stride[2],
                  .num_valid_blocks =
                      a.num_valid_blocks.given() ? a.num_valid_blocks.at<const int32_t>() : nullptr,
                  .blocks = static_cast<int32_t>(a.scores.shape[2])},
      chosen(p, a.block_ids, {}), stream);
}

std::span<const Kernel> kernels() {
  static constexpr Kernel kAll[] = {
      tuned<IndexScoresParams, fits, takes, run>(Op::kIndexScores, "sm90/index", workspace_bytes),
      tuned<SelectBlocksParams, fits, takes, run>(Op::kSelectBlocks, "sm90/index", workspace_bytes),
      tuned<IndexSelectParams, fits, takes, run>(Op::kIndexSelect, "sm90/index", workspace_bytes)};
  return kAll;
}

}  // namespace msa::cuda::sm90::index
