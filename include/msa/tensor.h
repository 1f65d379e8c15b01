// Typed, strided views over memory that the caller owns.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "msa/export.h"

namespace msa MSA_API {

/// Element type. Codes are part of the C ABI; the 8- and 4-bit ones are reserved.
enum class DType : uint8_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kI32 = 3,   ///< metadata: ids, lengths, page tables
  kE4M3 = 4,  ///< reserved
  kI8 = 5,    ///< reserved
  kE2M1 = 6,  ///< reserved
};

/// Bytes of one element (0 for the packed 4-bit type and for unknown codes).
constexpr int64_t size_of(DType dtype) {
  constexpr std::array<int8_t, 7> kBytes = {4, 2, 2, 4, 1, 1, 0};
  const auto code = static_cast<size_t>(dtype);
  return code < kBytes.size() ? kBytes[code] : 0;
}

/// "f32", "bf16", ... ; "unknown" for codes outside the enum.
const char* name_of(DType dtype);

/// Where memory lives. Codes follow DLPack.
enum class DeviceKind : int32_t { kCPU = 1, kCUDA = 2 };

struct Device {
  DeviceKind kind = DeviceKind::kCPU;
  int32_t id = 0;
  friend bool operator==(const Device&, const Device&) = default;
};

inline constexpr int kMaxRank = 4;

/// A view `data[i0*stride0 + i1*stride1 + ...]`; shapes and strides count elements, not bytes.
/// The innermost stride must be 1 (or its extent 1); every other stride is free, 0 included for
/// read-only arguments (one row shared by many). Offsets are 64-bit: a pool may exceed 2^31
/// elements. A default-constructed view (`data == nullptr`, rank 0) means "argument not given".
struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kF32;
  Device device{};
  int32_t rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> stride{};

  /// Contiguous (row-major) view over `data`. Shape has at most kMaxRank extents.
  static TensorView contiguous(const void* data, DType dtype,
                               std::initializer_list<int64_t> shape) {
    TensorView view;
    view.data = const_cast<void*>(data);
    view.dtype = dtype;
    for (int64_t extent : shape) view.shape[static_cast<size_t>(view.rank++)] = extent;
    int64_t step = 1;
    for (int i = view.rank - 1; i >= 0; --i) {
      view.stride[static_cast<size_t>(i)] = step;
      step *= view.shape[static_cast<size_t>(i)];
    }
    return view;
  }

  /// True when the argument was given. A given tensor may be empty (`numel() == 0`).
  bool given() const { return rank != 0; }

  int64_t numel() const {
    int64_t count = rank == 0 ? 0 : 1;
    for (int i = 0; i < rank; ++i) count *= shape[static_cast<size_t>(i)];
    return count;
  }

  /// Offset of an element (in elements); missing trailing indices are 0.
  template <class... Index>
  int64_t offset(Index... index) const {
    static_assert(sizeof...(Index) <= kMaxRank);
    size_t axis = 0;
    int64_t sum = 0;
    ((sum += static_cast<int64_t>(index) * stride[axis++]), ...);
    return sum;
  }

  /// Pointer to an element as T; the caller answers for T matching dtype.
  template <class T, class... Index>
  T* at(Index... index) const {
    return static_cast<T*>(data) + offset(index...);
  }
};

}  // namespace msa MSA_API
