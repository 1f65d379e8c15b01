// The inverse of block lists, a counting sort whose order no thread decides: the query tokens are
// cut into chunks, a warp each. It counts its chunk's entries per CSR row; sums over the chunks and
// over the rows say where each chunk's entries of a row begin; then the same warp walks the same
// entries again and writes them in order.
#include <algorithm>
#include <cub/block/block_scan.cuh>

#include "cuda/block_list.cuh"
#include "cuda/launch.h"
#include "cuda/smxx/inverse_lists.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"
#include "cuda/smxx/walk.cuh"

namespace msa::cuda::plain {
namespace {

constexpr int64_t kMostChunks = 256;
constexpr int kScanThreads = 1024;

struct Lists {
  DeviceBatch batch;
  Tensor ids;       ///< [Hkv,T,K]
  Tensor row_ptr;   ///< [Hkv,rows+1]
  Tensor entries;   ///< [Hkv,T*K]
  int32_t* counts;  ///< [Hkv,rows,chunks]: entries of a chunk in a row, then those before them
  int heads, tokens, topk;
  int rows;  ///< NB
  int chunks;
  int chunk_tokens;

  __device__ int32_t* row_counts(int head, int row) const {
    return counts + (int64_t{head} * rows + row) * chunks;
  }
};

/// visit(row, entry) for the entries of a chunk in ascending order. Of the lanes that visit
/// together no two have the same row: a token's list counts a block once.
template <class Visit>
__device__ void for_each_entry(const Lists& a, int head, int chunk, const Visit& visit) {
  const int begin = chunk * a.chunk_tokens, end = min(begin + a.chunk_tokens, a.tokens);
  DeviceSequence s{};
  int64_t row0 = 0;
  for (int t = begin; t < end; ++t) {
    if (t < s.q_begin || t >= s.q_begin + s.q_len) {
      const int b = a.batch.sequence_of(t);
      if (b < 0) return;  // padding up to the end
      s = a.batch.sequence(b);
      row0 = first_row(a.batch, b);
      if (t < s.q_begin || t >= s.q_begin + s.q_len) continue;
    }
    const int blocks = s.blocks(a.batch.block_size);
    const int32_t* ids = &a.ids.at<const int32_t>(head, t, 0);
    bool ascends = true;
    for (int slot0 = 0; slot0 < a.topk; slot0 += 32) {
      const int slot = slot0 + lane();
      const int id = slot < a.topk ? ids[slot] : -1;
      const uint32_t ends = __ballot_sync(0xffffffff, id < 0);
      const bool listed = (ends & ((2u << lane()) - 1)) == 0;
      const int64_t j = int64_t{id} - s.block0, row = row0 + j;
      ascends &= __all_sync(0xffffffff, !listed || slot == 0 || ids[slot - 1] < id);
      const bool given = listed && j >= 0 && j < blocks && row < a.rows;
      if (given && (ascends || !named_before(ids, slot)))
        visit(static_cast<int>(row), t * a.topk + slot);
      __syncwarp();
      if (ends != 0) break;
    }
  }
}

__global__ void __launch_bounds__(32) count_kernel(Lists a) {
  const int chunk = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  for_each_entry(a, head, chunk, [&](int row, int) { ++a.row_counts(head, row)[chunk]; });
}

/// A warp per row: counts of the chunks become sums of those before; row_ptr[row+1] = all of them.
__global__ void __launch_bounds__(128) sum_chunks_kernel(Lists a) {
  const int64_t row = int64_t{blockIdx.x} * warps() + warp();
  const int head = static_cast<int>(blockIdx.y);
  if (row >= a.rows) return;
  int32_t* counts = a.row_counts(head, static_cast<int>(row));
  int total = 0;
  for (int chunk0 = 0; chunk0 < a.chunks; chunk0 += 32) {
    const int chunk = chunk0 + lane();
    const int count = chunk < a.chunks ? counts[chunk] : 0;
    int sum = count;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(0xffffffff, sum, step);
      if (lane() >= step) sum += before;
    }
    if (chunk < a.chunks) counts[chunk] = total + sum - count;
    total += __shfl_sync(0xffffffff, sum, 31);
  }
  if (lane() == 0) a.row_ptr.at<int32_t>(head, row + 1) = total;
}

/// A CTA per head: sums over the rows, and -1 behind the last entry.
__global__ void __launch_bounds__(kScanThreads) sum_rows_kernel(Lists a) {
  using Scan = cub::BlockScan<int, kScanThreads>;
  __shared__ Scan::TempStorage scratch;
  const int head = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int total = 0;
  for (int row0 = 0; row0 < a.rows; row0 += kScanThreads) {
    const int row = row0 + thread;
    int32_t& end = a.row_ptr.at<int32_t>(head, min(row, a.rows - 1) + 1);
    int sum = row < a.rows ? end : 0, all = 0;
    Scan(scratch).InclusiveSum(sum, sum, all);
    __syncthreads();
    if (row < a.rows) end = total + sum;
    total += all;
  }
  if (thread == 0) a.row_ptr.at<int32_t>(head, 0) = 0;
  for (int64_t entry = total + thread; entry < int64_t{a.tokens} * a.topk; entry += kScanThreads)
    a.entries.at<int32_t>(head, entry) = -1;
}

__global__ void __launch_bounds__(32) fill_kernel(Lists a) {
  const int chunk = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  for_each_entry(a, head, chunk, [&](int row, int entry) {
    const int before = a.row_counts(head, row)[chunk]++;
    a.entries.at<int32_t>(head, a.row_ptr.at<const int32_t>(head, row) + before) = entry;
  });
}

int64_t chunk_tokens(const Limits& limits) {
  return std::max<int64_t>(1, ceil_div(limits.max_tokens, kMostChunks));
}

/// Most rows, NB, that a call within the limits can have.
int64_t most_rows(const Problem& p, const Limits& limits) {
  return limits.max_batch * ceil_div(limits.max_seqlen_k, int64_t{p.block_size});
}

}  // namespace

int64_t block_lists_bytes(const Problem& p, const Limits& limits) {
  const int64_t chunks = ceil_div(limits.max_tokens, chunk_tokens(limits));
  return p.heads_kv * most_rows(p, limits) * chunks * 4;
}

template <>
Status run(const Plan& plan, const BlockListsParams& a, Workspace workspace, cudaStream_t stream) {
  const Problem& p = plan.problem;
  const int64_t tokens = a.block_ids.shape[1], rows = a.row_ptr.shape[1] - 1;
  const int64_t each = chunk_tokens(plan.limits), chunks = ceil_div(tokens, each);
  const int64_t bytes = p.heads_kv * rows * chunks * 4;
  if (bytes > plan.workspace_bytes)
    return invalid("row_ptr: got ", rows + 1,
                   " columns, more than max_batch * ceil(max_seqlen_k/Bk)", " + 1 of the plan");
  const Lists lists{.batch = device_batch(a.batch, tokens, {}, p.block_size),
                    .ids = tensor(a.block_ids),
                    .row_ptr = tensor(a.row_ptr),
                    .entries = tensor(a.entries),
                    .counts = static_cast<int32_t*>(workspace.data),
                    .heads = p.heads_kv,
                    .tokens = static_cast<int>(tokens),
                    .topk = p.topk,
                    .rows = static_cast<int>(rows),
                    .chunks = static_cast<int>(chunks),
                    .chunk_tokens = static_cast<int>(each)};
  const auto heads = static_cast<uint32_t>(p.heads_kv);
  const LaunchShape by_chunk{.grid = dim3(static_cast<uint32_t>(chunks), heads), .block = dim3(32)};
  const LaunchShape by_row{.grid = dim3(static_cast<uint32_t>(ceil_div(rows, 4)), heads),
                           .block = dim3(128)};
  if (bytes > 0)
    MSA_TRY(check_cuda(cudaMemsetAsync(workspace.data, 0, static_cast<size_t>(bytes), stream),
                       "block_lists"));
  MSA_TRY(launch("block_lists count", count_kernel, by_chunk, stream, lists));
  MSA_TRY(launch("block_lists chunks", sum_chunks_kernel, by_row, stream, lists));
  MSA_TRY(launch("block_lists rows", sum_rows_kernel,
                 LaunchShape{.grid = dim3(heads), .block = dim3(kScanThreads)}, stream, lists));
  return launch("block_lists fill", fill_kernel, by_chunk, stream, lists);
}

int64_t inverse_lists_bytes(const Problem& p, const Limits& limits) {
  const int64_t row_ptr = p.heads_kv * (most_rows(p, limits) + 1) * 4;
  const int64_t entries = p.heads_kv * limits.max_tokens * p.topk * 4;
  return aligned(row_ptr) + aligned(entries) + block_lists_bytes(p, limits);
}

Status inverse_lists(const Plan& plan, const TensorView& ids, const TensorView& row_ptr,
                     const TensorView& entries, const Batch& batch, int64_t keys,
                     Workspace workspace, cudaStream_t stream, InverseLists* out) {
  const Problem& p = plan.problem;
  *out = {};
  if (!ids.given()) return {};
  const int64_t most = ids.shape[1] * p.topk;
  BlockListsParams made{.block_ids = ids, .batch = batch, .row_ptr = row_ptr, .entries = entries};
  if (!row_ptr.given()) {
    const int64_t rows = std::min(most_rows(p, plan.limits),  // and no more than the keys fill
                                  batch.cu_seqlens_q.shape[0] - 1 + keys / p.block_size);
    Plan block_lists = plan;
    block_lists.problem.op = Op::kBlockLists;
    block_lists.workspace_bytes = block_lists_bytes(p, plan.limits);
    auto* memory = static_cast<std::byte*>(workspace.data);
    made.row_ptr = TensorView::contiguous(memory, DType::kI32, {p.heads_kv, rows + 1});
    memory += aligned(p.heads_kv * (rows + 1) * 4);
    made.entries = TensorView::contiguous(memory, DType::kI32, {p.heads_kv, most});
    memory += aligned(p.heads_kv * most * 4);
    MSA_TRY(
        run(block_lists, made, {memory, static_cast<size_t>(block_lists.workspace_bytes)}, stream));
  }
  *out = {.row_ptr = tensor(made.row_ptr),
          .entries = tensor(made.entries),
          .rows = made.row_ptr.shape[1] - 1,
          .most = most,
          .topk = p.topk};
  return {};
}

}  // namespace msa::cuda::plain
