// Steps that both families of training launch: inverse lists, tasks of them, sums of their parts.
#pragma once

#include <cstddef>

#include "cuda/launch.h"
#include "cuda/sm90/walk/make_tasks.cuh"
#include "cuda/sm90/walk/reduce_parts.cuh"
#include "cuda/smxx/plain.h"

namespace msa::cuda::sm90::walk {

/// Where a workspace has room for inverse lists.
struct ListRoom {
  int64_t rows;
  void* row_ptr;       ///< i32 [Hkv,rows+1]
  void* entries;       ///< i32 [Hkv,T*K]
  std::byte* scratch;  ///< plain::block_lists_bytes()
};

/// *out = row_ptr and entries of `lists` where the caller has them, else what block_lists makes of
/// its ids in `room`.
inline Status make_inverse_lists(const Plan& plan, BlockListsParams lists, const ListRoom& room,
                                 cudaStream_t stream, InverseLists* out) {
  const Problem& p = plan.problem;
  if (!lists.row_ptr.given()) {
    const int64_t entries = lists.block_ids.shape[1] * p.topk;
    lists.row_ptr = TensorView::contiguous(room.row_ptr, DType::kI32, {p.heads_kv, room.rows + 1});
    lists.entries = TensorView::contiguous(room.entries, DType::kI32, {p.heads_kv, entries});
    Plan making = plan;
    making.problem.op = Op::kBlockLists;
    making.workspace_bytes = plain::block_lists_bytes(p, plan.limits);
    MSA_TRY(plain::run(making, lists, {room.scratch, static_cast<size_t>(making.workspace_bytes)},
                       stream));
  }
  *out = {.row_ptr = lists.row_ptr.at<const int32_t>(),
          .entries = lists.entries.at<const int32_t>(),
          .row_ptr_stride = lists.row_ptr.stride[0],
          .entries_stride = lists.entries.stride[0],
          .rows = static_cast<int32_t>(lists.row_ptr.shape[1] - 1),
          .topk = p.topk};
  return {};
}

inline Status launch_make_tasks(const char* name, const MakeTasksArgs& args, cudaStream_t stream) {
  return launch(name, make_tasks, {.grid = 1, .block = kMakeThreads}, stream, args);
}

/// The parts of `args` into `out` [S,D], or [S,heads,D] for each head by itself.
inline Status launch_reduce_parts(const char* name, ReduceArgs args, const TensorView& out,
                                  cudaStream_t stream) {
  const bool by_head = out.rank == 3;
  args.out = {out.data, out.stride[0], by_head ? out.stride[1] : 0};
  args.keys = static_cast<int32_t>(out.shape[0]);
  constexpr int64_t kRows = kReduceThreads / 32;  // of a CTA
  return launch(name, out.dtype == DType::kF32 ? reduce_parts<float> : reduce_parts<__nv_bfloat16>,
                {.grid = dim3(static_cast<uint32_t>(ceil_div(out.shape[0], kRows)),
                              by_head ? static_cast<uint32_t>(out.shape[1]) : 1),
                 .block = kReduceThreads,
                 .overlap = true},
                stream, args);
}

}  // namespace msa::cuda::sm90::walk
