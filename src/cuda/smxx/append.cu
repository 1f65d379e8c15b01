// Writing new rows into their pages: a CTA per token, bits copied as they are.
#include "cuda/launch.h"
#include "cuda/smxx/plain.h"
#include "cuda/smxx/tile.cuh"

namespace msa::cuda::plain {
namespace {

struct Append {
  DeviceBatch batch;
  Tensor rows;          ///< [T,H,dim], or [T,dim] with one head
  KeyTensor pages;      ///< of the cache
  int64_t head_stride;  ///< of rows
  int heads, dim;
};

template <class Bits>
__global__ void __launch_bounds__(128) append_kernel(Append a) {
  const int t = static_cast<int>(blockIdx.x);
  const Query query = query_at(a.batch, t);
  const int position = query.s.kv_len - query.s.q_len + query.i;
  if (query.s.kv_len == 0 || position < 0) return;  // padding
  const Place place = place_of(a.batch, query.s, position);
  if (place.row < 0) return;
  const Bits* from = static_cast<const Bits*>(a.rows.data) + t * a.rows.stride[0];
  Bits* to = static_cast<Bits*>(const_cast<void*>(a.pages.data)) + place.row * a.pages.row_stride +
             place.slot * a.pages.slot_stride;
  for (int i = static_cast<int>(threadIdx.x); i < a.heads * a.dim; i += 128) {
    const int h = i / a.dim, d = i % a.dim;
    to[h * a.pages.head_stride + d] = from[h * a.head_stride + d];
  }
}

Status append(const Plan& plan, const Batch& batch, const TensorView& rows, const TensorView& pages,
              cudaStream_t stream) {
  if (!rows.given()) return {};
  const bool has_heads = rows.rank == 3;
  const auto last = static_cast<size_t>(rows.rank - 1);
  const Append args{.batch = device_batch(batch, rows.shape[0], pages, plan.problem.block_size),
                    .rows = tensor(rows),
                    .pages = key_tensor(pages, KvLayout::kPaged),
                    .head_stride = has_heads ? rows.stride[1] : 0,
                    .heads = has_heads ? static_cast<int>(rows.shape[1]) : 1,
                    .dim = static_cast<int>(rows.shape[last])};
  const LaunchShape shape{.grid = dim3(static_cast<uint32_t>(rows.shape[0])), .block = dim3(128)};
  return launch("append_paged",
                size_of(rows.dtype) == 4 ? append_kernel<uint32_t> : append_kernel<uint16_t>, shape,
                stream, args);
}

}  // namespace

template <>
Status run(const Plan& plan, const AppendPagedParams& a, Workspace, cudaStream_t stream) {
  MSA_TRY(append(plan, a.batch, a.k, a.k_pages, stream));
  MSA_TRY(append(plan, a.batch, a.v, a.v_pages, stream));
  return append(plan, a.batch, a.k_idx, a.k_idx_pages, stream);
}

}  // namespace msa::cuda::plain
