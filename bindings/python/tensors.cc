#include "tensors.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "errors.h"

namespace msa::python {
namespace {

// The DLPack C exchange API (DLPack 1.2): a type that has it lends views without any allocation.
struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;  // a struct of an earlier major version, or null
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*view_from_py_object)(void* object, nb::dlpack::dltensor* out);  // may be null
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};
constexpr uint32_t kExchangeMajor = 1;

// What NumPy's __array_struct__ points to.
struct ArrayInterface {
  int two, rank;
  char kind;
  int item_size, flags;
  intptr_t* shape;
  intptr_t* strides;  // bytes
  void* data;
};
constexpr int kNotSwapped = 0x200, kWriteable = 0x400;

constexpr int32_t kCudaHost = 3, kCudaManaged = 13;  // DLPack's devices beside CPU and CUDA
constexpr auto kInt = static_cast<uint8_t>(nb::dlpack::dtype_code::Int);
constexpr auto kFloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Float);
constexpr auto kBfloat = static_cast<uint8_t>(nb::dlpack::dtype_code::Bfloat);
constexpr auto kBool = static_cast<uint8_t>(nb::dlpack::dtype_code::Bool);
constexpr uint8_t kOther = 255;

/// An array of any dtype and rank; extents beyond kMaxRank are not kept. Strides count elements.
struct Array {
  void* data = nullptr;
  uint8_t code = kOther;
  int bits = 0;
  int32_t device_type = 0, device_id = 0;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{}, stride{};
  bool writeable = true;
};

/// How objects of one type are read.
struct Source {
  PyTypeObject* type = nullptr;  // a strong reference, so that the address stays its own
  enum { kExchange, kArrayStruct, kDlpack, kNone } route = kNone;
  const ExchangeApi* api = nullptr;
};

Source find_source(PyTypeObject* type) {
  Source source{.type = type};
  const nb::handle object(reinterpret_cast<PyObject*>(type));
  if (const nb::object capsule = nb::getattr(object, "__dlpack_c_exchange_api__", nb::none());
      PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) {
    auto* api =
        static_cast<ExchangeApi*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    while (api != nullptr && api->major != kExchangeMajor) api = api->older;
    source.api = api;
  }
  if (source.api != nullptr && source.api->view_from_py_object != nullptr) {
    source.route = Source::kExchange;
  } else if (nb::hasattr(object, "__array_struct__")) {
    source.route = Source::kArrayStruct;
  } else if (nb::hasattr(object, "__dlpack__")) {
    source.route = Source::kDlpack;
  }
  return source;
}

/// Remembers the first few types that it meets; the GIL guards the list.
Source source_of(nb::handle array) {
  static std::array<Source, 16> known;
  static size_t count = 0;
  PyTypeObject* type = Py_TYPE(array.ptr());
  for (size_t i = 0; i < count; ++i)
    if (known[i].type == type) return known[i];
  const Source source = find_source(type);
  if (source.route != Source::kNone && count < known.size()) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));
    known[count++] = source;
  }
  return source;
}

std::string dtype_name(nb::handle array) {
  const nb::object dtype = nb::getattr(array, "dtype", nb::none());
  return dtype.is_none() ? "another one" : nb::cast<std::string>(nb::str(dtype));
}

/// Shape and, unless null (contiguous), strides of `item` bytes each (1: they count elements).
template <class Extent>
void set_extents(const char* name, int rank, const Extent* shape, const Extent* strides,
                 int64_t item, Array* out) {
  out->rank = rank;
  int64_t step = 1;
  for (int i = std::min(rank, kMaxRank) - 1; i >= 0; --i) {
    const auto axis = static_cast<size_t>(i);
    out->shape[axis] = shape[axis];
    out->stride[axis] = strides == nullptr ? step : strides[axis] / item;
    if (strides != nullptr && strides[axis] % item != 0)
      raise(PyExc_ValueError, name, ": got a stride of ", strides[axis], " bytes on axis ", i,
            ", expected a multiple of the ", item, " of an element");
    step *= shape[axis];
  }
}

Array from_dlpack(const char* name, const nb::dlpack::dltensor& t) {
  Array out{.data = static_cast<char*>(t.data) + t.byte_offset,
            .code = t.dtype.lanes == 1 ? t.dtype.code : kOther,
            .bits = t.dtype.bits,
            .device_type = t.device.device_type,
            .device_id = t.device.device_id};
  if (t.data == nullptr) out.data = nullptr;
  set_extents<int64_t>(name, t.ndim, t.shape, t.strides, 1, &out);
  return out;
}

Array from_array_struct(const char* name, nb::handle array) {
  const nb::object capsule = array.attr("__array_struct__");
  const auto* a = static_cast<ArrayInterface*>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
  if (a == nullptr) throw nb::python_error();
  if ((a->flags & kNotSwapped) == 0 && a->item_size > 1)
    raise(PyExc_ValueError, name, ": got foreign byte order, expected this machine's");
  Array out{.data = a->data,
            .bits = 8 * a->item_size,
            .device_type = static_cast<int32_t>(DeviceKind::kCPU),
            .writeable = (a->flags & kWriteable) != 0};
  if (a->kind == 'f') out.code = kFloat;
  if (a->kind == 'b') out.code = kBool;
  if (a->kind == 'i') out.code = kInt;
  if (a->kind == 'V' && a->item_size == 2 && dtype_name(array) == "bfloat16") out.code = kBfloat;
  set_extents<intptr_t>(name, a->rank, a->shape, a->strides, std::max(a->item_size, 1), &out);
  return out;
}

/// Any other exporter, by the DLPack call of Python.
Array from_exporter(const char* name, nb::handle array, bool written, Leases* leases) {
  nb::object exporter = nb::borrow(array);
  if (nb::hasattr(array, "detach")) exporter = array.attr("detach")();  // torch before 2.10
  nb::ndarray<nb::ro> lent;
  nb::ndarray<> writable;
  if (written ? !nb::try_cast(exporter, writable, false) : !nb::try_cast(exporter, lent, false)) {
    raise(PyExc_TypeError, name, ": ", nb::type_name(array.type()).c_str(), " does not lend ",
          written ? "writable " : "", "memory by DLPack");
  }
  if (written) lent = nb::ndarray<nb::ro>(writable.handle());
  leases->push_back(lent);
  nb::dlpack::dltensor t;
  t.data = const_cast<void*>(lent.data());
  t.device = {lent.device_type(), lent.device_id()};
  t.ndim = static_cast<int32_t>(lent.ndim());
  t.dtype = lent.dtype();
  t.shape = const_cast<int64_t*>(lent.shape_ptr());
  t.strides = const_cast<int64_t*>(lent.stride_ptr());
  return from_dlpack(name, t);
}

Array array_of(nb::handle array, const char* name, bool written, Leases* leases) {
  const Source source = source_of(array);
  Array out;
  switch (source.route) {
    case Source::kExchange: {
      nb::dlpack::dltensor t;
      if (source.api->view_from_py_object(array.ptr(), &t) != 0) {
        nb::python_error cause;
        nb::raise_from(cause, PyExc_TypeError, "%s: lends no memory", name);
      }
      out = from_dlpack(name, t);
      break;
    }
    case Source::kArrayStruct:
      out = from_array_struct(name, array);
      break;
    case Source::kDlpack:
      out = from_exporter(name, array, written, leases);
      break;
    case Source::kNone:
      raise(PyExc_TypeError, name, ": got ", nb::type_name(array.type()).c_str(),
            ", expected a NumPy array, a torch tensor or another DLPack array");
  }
  if (written && !out.writeable)
    raise(PyExc_ValueError, name, ": got a read-only array, expected a writable one");
  return out;
}

DType dtype_of(nb::handle array, const char* name, Content content, const Array& a) {
  const bool real = content != Content::kI32 && content != Content::kBlocks;
  const bool rows = content == Content::kRows || content == Content::kWide;
  if (real && a.code == kFloat && a.bits == 32) return DType::kF32;
  if (rows && a.code == kFloat && a.bits == 16) return DType::kF16;
  if (rows && a.code == kBfloat && a.bits == 16) return DType::kBF16;
  if (!real && a.code == kInt && a.bits == 32) return DType::kI32;
  if (rows && a.bits == 8 && a.code != kBool)
    raise(PyExc_NotImplementedError, name, ": got dtype ", dtype_name(array),
          "; 8-bit and 4-bit elements are not in this version");
  raise(PyExc_TypeError, name, ": got dtype ", dtype_name(array), ", expected ",
        rows   ? "float32, bfloat16 or float16"
        : real ? "float32"
               : "int32",
        " (nothing is converted here, since that would be a copy)");
}

Device device_of(const char* name, const Array& a) {
  constexpr auto cpu = static_cast<int32_t>(DeviceKind::kCPU);
  constexpr auto cuda = static_cast<int32_t>(DeviceKind::kCUDA);
  if (a.device_type == cpu || a.device_type == kCudaHost) return {};
  if (a.device_type == cuda || a.device_type == kCudaManaged)
    return {DeviceKind::kCUDA, a.device_id};
  raise(PyExc_ValueError, name, ": got DLPack device ", a.device_type,
        ", expected CPU or CUDA memory");
}

}  // namespace

TensorView view_of(nb::handle array, const char* name, Content content, bool written,
                   Leases* leases) {
  const Array a = array_of(array, name, written, leases);
  TensorView view{.data = a.data,
                  .dtype = dtype_of(array, name, content, a),
                  .device = device_of(name, a),
                  .rank = a.rank,
                  .shape = a.shape,
                  .stride = a.stride};
  if (a.rank == 0 || a.rank > kMaxRank)
    raise(PyExc_ValueError, name, ": got rank ", a.rank, ", expected 1 to ", kMaxRank);
  if (view.numel() == 0) view.stride.fill(1);  // NumPy gives empty arrays any strides
  return view;
}

Workspace workspace_of(nb::handle array, Leases* leases) {
  const Array a = array_of(array, "workspace", true, leases);
  if (a.rank != 1 || (a.shape[0] > 1 && a.stride[0] != 1))
    raise(PyExc_ValueError, "workspace: got rank ", a.rank, " innermost stride ",
          a.rank > 0 ? a.stride[0] : 0, ", expected a contiguous vector");
  return {a.data, static_cast<size_t>(a.shape[0] * a.bits / 8)};
}

void* current_stream(nb::handle array, Device device) {
  const Source source = source_of(array);
  if (source.api == nullptr) {  // torch before 2.10 says it in Python
    const nb::object stream =
        nb::module_::import_("msa_cpp._arrays").attr("stream")(array, device.id);
    return PyLong_AsVoidPtr(stream.ptr());
  }
  void* stream = nullptr;
  if (source.api->current_stream(static_cast<int32_t>(device.kind), device.id, &stream) != 0)
    throw nb::python_error();
  return stream;
}

}  // namespace msa::python
