#include "conformance/tensors.h"

#include <algorithm>
#include <cstring>

#include "core/op_table.h"

namespace msa::conformance {
ParamsRef params_ref(const Params& params) {
  return std::visit([](const auto& a) { return ParamsRef(a); }, params);
}

void* data_of(Params& params) {
  return std::visit([](auto& a) -> void* { return &a; }, params);
}

std::vector<TensorView*> arguments(Params& params) {
  const OpInfo& info = info_of(params_ref(params).op());
  std::vector<TensorView*> all;
  for (const Argument& a : info.arguments)
    if (a.is_tensor()) all.push_back(&a.in(data_of(params)));
  if (info.has_batch()) {
    Batch& b = info.batch_in(data_of(params));
    for (TensorView* view : {&b.cu_seqlens_q, &b.cu_seqlens_k, &b.seq_lens, &b.page_table,
                             &b.q_offset, &b.block_offset, &b.page_rows})
      all.push_back(view);
  }
  return all;
}

std::vector<Output> outputs(Params& params) {
  std::vector<Output> all;
  for (const Argument& a : info_of(params_ref(params).op()).arguments)
    if (a.is_tensor() && a.is_written() && a.in(data_of(params)).given())
      all.push_back({a.name, &a.in(data_of(params))});
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
