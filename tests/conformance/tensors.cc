#include "conformance/tensors.h"

#include <algorithm>
#include <cstring>

namespace msa::conformance {
namespace {

std::vector<Output> list(IndexScoresParams& a) { return {{"scores", &a.scores}}; }
std::vector<Output> list(SelectBlocksParams& a) { return {{"ids", &a.ids}}; }
std::vector<Output> list(IndexSelectParams& a) { return {{"ids", &a.ids}, {"scores", &a.scores}}; }
std::vector<Output> list(SparseAttentionParams& a) { return {{"o", &a.o}, {"lse", &a.lse}}; }
std::vector<Output> list(DenseAttentionParams& a) {
  return {{"o", &a.o}, {"lse", &a.lse}, {"block_max", &a.block_max}};
}
std::vector<Output> list(MergeParams& a) { return {{"o", &a.o}, {"lse", &a.lse}}; }
std::vector<Output> list(BlockListsParams& a) {
  return {{"row_ptr", &a.row_ptr}, {"entries", &a.entries}};
}
std::vector<Output> list(AppendPagedParams& a) {
  return {{"k_pages", &a.k_pages}, {"v_pages", &a.v_pages}, {"k_idx_pages", &a.k_idx_pages}};
}
std::vector<Output> list(BlockMassParams& a) { return {{"mass", &a.mass}}; }
std::vector<Output> list(LayerDecodeParams& a) {
  return {{"o", &a.o}, {"lse", &a.lse}, {"ids", &a.ids}};
}

std::vector<Output> list(AttentionBackwardParams& a) {
  return {{"dq", &a.dq}, {"dk", &a.dk}, {"dv", &a.dv}};
}
std::vector<Output> list(IndexLseParams& a) { return {{"lse", &a.lse}}; }
std::vector<Output> list(KlParams& a) {
  return {{"dq_idx", &a.dq_idx}, {"dk_idx", &a.dk_idx}, {"kl", &a.kl}};
}

template <class P>
std::vector<TensorView*> all_of(P& a) {
  std::vector<TensorView*> all;
  if constexpr (requires { a.q_idx; }) all.push_back(&a.q_idx);
  if constexpr (requires { a.k_idx; }) all.push_back(&a.k_idx);
  if constexpr (requires { a.q; }) all.push_back(&a.q);
  if constexpr (requires { a.k; }) all.push_back(&a.k);
  if constexpr (requires { a.v; }) all.push_back(&a.v);
  if constexpr (requires { a.ids; }) all.push_back(&a.ids);
  if constexpr (requires { a.scores; }) all.push_back(&a.scores);
  if constexpr (requires { a.num_valid_blocks; }) all.push_back(&a.num_valid_blocks);
  if constexpr (requires { a.o; }) all.push_back(&a.o);
  if constexpr (requires { a.lse; }) all.push_back(&a.lse);
  if constexpr (requires { a.block_max; }) all.push_back(&a.block_max);
  if constexpr (requires { a.o_parts; }) all.push_back(&a.o_parts);
  if constexpr (requires { a.lse_parts; }) all.push_back(&a.lse_parts);
  if constexpr (requires { a.row_ptr; }) all.push_back(&a.row_ptr);
  if constexpr (requires { a.entries; }) all.push_back(&a.entries);
  if constexpr (requires { a.k_pages; }) all.push_back(&a.k_pages);
  if constexpr (requires { a.v_pages; }) all.push_back(&a.v_pages);
  if constexpr (requires { a.k_idx_pages; }) all.push_back(&a.k_idx_pages);
  if constexpr (requires { a.mass; }) all.push_back(&a.mass);
  if constexpr (requires { a.d_o; }) all.push_back(&a.d_o);
  if constexpr (requires { a.index_lse; }) all.push_back(&a.index_lse);
  if constexpr (requires { a.dq; })
    for (TensorView* view : {&a.dq, &a.dk, &a.dv}) all.push_back(view);
  if constexpr (requires { a.dq_idx; })
    for (TensorView* view : {&a.dq_idx, &a.dk_idx, &a.kl}) all.push_back(view);
  if constexpr (requires { a.batch; }) {
    Batch& b = a.batch;
    for (TensorView* view : {&b.cu_seqlens_q, &b.cu_seqlens_k, &b.seq_lens, &b.page_table,
                             &b.q_offset, &b.block_offset, &b.page_rows})
      all.push_back(view);
  }
  return all;
}

}  // namespace

std::vector<TensorView*> arguments(Params& params) {
  return std::visit([](auto& a) { return all_of(a); }, params);
}

std::vector<Output> outputs(Params& params) {
  std::vector<Output> all = std::visit([](auto& a) { return list(a); }, params);
  std::erase_if(all, [](const Output& o) { return !o.view->given(); });
  return all;
}

int64_t element_offset(const TensorView& view, int64_t linear) {
  int64_t offset = 0;
  for (size_t i = static_cast<size_t>(view.rank); i-- > 0;) {
    offset += linear % view.shape[i] * view.stride[i];
    linear /= view.shape[i];
  }
  return offset;
}

std::vector<std::byte> gather(const TensorView& view) {
  const int64_t size = size_of(view.dtype);
  std::vector<std::byte> elements(static_cast<size_t>(view.numel() * size));
  for (int64_t i = 0; i < view.numel(); ++i)
    std::memcpy(elements.data() + i * size,
                static_cast<const std::byte*>(view.data) + element_offset(view, i) * size,
                static_cast<size_t>(size));
  return elements;
}

void scatter(const std::vector<std::byte>& elements, const TensorView& view) {
  const int64_t size = size_of(view.dtype);
  for (int64_t i = 0; i < view.numel(); ++i)
    std::memcpy(static_cast<std::byte*>(view.data) + element_offset(view, i) * size,
                elements.data() + i * size, static_cast<size_t>(size));
}

}  // namespace msa::conformance
