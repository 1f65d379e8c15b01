#include "cuda/tensor_map.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "core/text.h"

namespace msa::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult result{};
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess) {
      entry = nullptr;
    }
    return reinterpret_cast<Encode>(entry);
  }();
  return found;
}

struct Axis {
  int64_t extent;
  int64_t stride;  // elements
  uint32_t box;
};

/// Columns are innermost, with stride 1.
Status encode(const char* name, const TensorView& view, int64_t columns,
              const std::array<Axis, 3>& outer, CUtensorMap* out) {
  constexpr int64_t kAlignment = 16;  // bytes, of addresses and strides
  const int64_t size = size_of(view.dtype);
  if (reinterpret_cast<uintptr_t>(view.data) % kAlignment != 0)
    return invalid(name, ": got an address that is not a multiple of 16 bytes, which CUDA needs");
  std::array<cuuint64_t, 4> extents{static_cast<cuuint64_t>(columns)};
  std::array<cuuint64_t, 3> strides{};
  std::array<cuuint32_t, 4> box{static_cast<cuuint32_t>(128 / size)};
  const std::array<cuuint32_t, 4> steps{1, 1, 1, 1};
  for (size_t i = 0; i < outer.size(); ++i) {
    const bool stepped = outer[i].extent > 1;
    if (stepped && (outer[i].stride * size % kAlignment != 0 || outer[i].stride <= 0))
      return invalid(name, ": got a stride of ", outer[i].stride, " elements (",
                     outer[i].stride * size,
                     " bytes), expected a positive multiple of 16 bytes on CUDA");
    extents[i + 1] = static_cast<cuuint64_t>(std::max<int64_t>(outer[i].extent, 1));
    strides[i] = static_cast<cuuint64_t>(stepped ? outer[i].stride * size : 128);
    box[i + 1] = outer[i].box;
  }
  if (encoder() == nullptr)
    return error(StatusCode::kUnavailable,
                 "the CUDA driver has no tensor maps; it must be 12.0 or "
                 "newer");
  // An empty tensor has no address, and nobody reads it.
  void* address = view.data != nullptr ? view.data : reinterpret_cast<void*>(uintptr_t{256});
  // No promotion: whole boxes are read anyway, and promotion to 256 bytes costs 7 % of the read
  // bandwidth (4.13 against 4.42 TB/s on an H200).
  const CUresult result =
      encoder()(out, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, address, extents.data(), strides.data(),
                box.data(), steps.data(), CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    return error(StatusCode::kInternal, name, ": the driver refused a tensor map, error ",
                 static_cast<int>(result));
  return {};
}

}  // namespace

Status map_keys(const char* name, const TensorView& keys, KvLayout layout, uint32_t rows,
                CUtensorMap* out) {
  const auto axis = [&](size_t i, uint32_t box) {
    return Axis{keys.shape[i], keys.stride[i], box};
  };
  const auto last = static_cast<size_t>(keys.rank - 1);
  const Axis one{.extent = 1, .stride = 0, .box = 1};
  const bool paged = layout == KvLayout::kPaged;
  const bool has_heads = keys.rank == (paged ? 4 : 3);
  const Axis token = axis(paged ? last - 1 : 0, rows);
  const Axis head = has_heads ? axis(1, 1) : one;
  const Axis page = paged ? axis(0, 1) : one;
  return encode(name, keys, keys.shape[last], {token, head, page}, out);
}

Status map_queries(const char* name, const TensorView& queries, uint32_t heads, uint32_t tokens,
                   CUtensorMap* out) {
  return encode(
      name, queries, queries.shape[2],
      {Axis{queries.shape[1], queries.stride[1], heads},
       Axis{queries.shape[0], queries.stride[0], tokens}, Axis{.extent = 1, .stride = 0, .box = 1}},
      out);
}

}  // namespace msa::cuda
