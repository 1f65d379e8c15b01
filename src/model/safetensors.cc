#include "model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "core/text.h"

namespace msa::model {
namespace {

using nlohmann::json;

// The format's own cap: a header of more than 100 MB is not a header.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;

struct DTypeName {
  std::string_view name;
  int64_t bits;
};

constexpr std::array<DTypeName, 24> kDTypes{{
    {"F32", 32},    {"BF16", 16},   {"F16", 16},    {"I32", 32},        {"I64", 64},
    {"F64", 64},    {"C64", 64},    {"U64", 64},    {"U32", 32},        {"U16", 16},
    {"U8", 8},      {"I16", 16},    {"I8", 8},      {"BOOL", 8},        {"F8_E4M3", 8},
    {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"F4", 4},
    {"I4", 4},      {"U4", 4},      {"F4_E2M1", 4}, {"F8_E4M3FNUZ", 8},
}};

int64_t bits_of(std::string_view dtype) {
  for (const DTypeName& known : kDTypes)
    if (known.name == dtype) return known.bits;
  return 0;
}

uint64_t load_u64(const std::byte* data) {
  uint64_t value = 0;
  for (int i = 7; i >= 0; --i) value = value << 8 | std::to_integer<uint64_t>(data[i]);
  return value;
}

// A JSON header as a tree; a repeated name at the top level is reported, and so is nesting that no
// header has (which would cost memory out of proportion to the file).
Status parse_header(std::string_view header, json* out) {
  std::set<std::string> names;
  std::string repeated;
  bool too_deep = false;
  const auto watch = [&](int depth, json::parse_event_t event, json& parsed) {
    if (depth > 3) {
      too_deep = true;
      return false;
    }
    if (event == json::parse_event_t::key && depth == 1) {
      const std::string& name = parsed.get_ref<const std::string&>();
      if (!names.insert(name).second && repeated.empty()) repeated = name;
    }
    return true;
  };
  *out = json::parse(header, watch, /*allow_exceptions=*/false);
  if (too_deep) return invalid("header: nested deeper than a tensor entry");
  if (out->is_discarded()) return invalid("header: not valid JSON");
  if (!out->is_object()) return invalid("header: expected a JSON object of tensors");
  if (!repeated.empty()) return invalid("tensor ", repeated, ": named twice in the header");
  return {};
}

bool to_int64(const json& value, int64_t* out) {
  if (!value.is_number_unsigned()) return false;
  const uint64_t number = value.get<uint64_t>();
  if (number > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) return false;
  *out = static_cast<int64_t>(number);
  return true;
}

Status parse_entry(const std::string& name, const json& value, std::span<const std::byte> data,
                   TensorEntry* out) {
  const auto bad = [&](const auto&... parts) { return invalid("tensor ", name, ": ", parts...); };
  if (!value.is_object() || !value.contains("dtype") || !value.contains("shape") ||
      !value.contains("data_offsets"))
    return bad("expected an object with dtype, shape and data_offsets");
  const json& dtype = value["dtype"];
  const json& shape = value["shape"];
  const json& range = value["data_offsets"];
  const int64_t bits = dtype.is_string() ? bits_of(dtype.get_ref<const std::string&>()) : 0;
  if (bits == 0) return bad("dtype: got ", dtype.dump(), ", expected a safetensors dtype name");
  if (!shape.is_array()) return bad("shape: expected a list of extents");

  out->name = name;
  out->dtype = dtype.get<std::string>();
  out->shape.clear();
  int64_t total_bits = bits;
  for (const json& extent : shape) {
    int64_t size = 0;
    if (!to_int64(extent, &size))
      return bad("shape: got ", shape.dump(), ", expected extents >= 0");
    if (__builtin_mul_overflow(total_bits, size, &total_bits))
      return bad("shape: got ", shape.dump(), ", its size overflows 64 bits");
    out->shape.push_back(size);
  }

  int64_t begin = 0, end = 0;
  if (!range.is_array() || range.size() != 2 || !to_int64(range[0], &begin) ||
      !to_int64(range[1], &end) || begin > end)
    return bad("data_offsets: got ", range.dump(), ", expected [begin, end]");
  if (static_cast<uint64_t>(end) > data.size())
    return bad("data_offsets: got ", range.dump(), ", the file holds ", data.size(),
               " bytes of data (truncated?)");
  if (total_bits % 8 != 0 || end - begin != total_bits / 8)
    return bad("data_offsets: got ", end - begin, " bytes, but ", out->dtype, " ",
               shape_text(out->shape), " takes ", total_bits / 8);
  out->bytes = data.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  return {};
}

Status parse_metadata(const json& value, Metadata* out) {
  if (!value.is_object()) return invalid("__metadata__: expected an object of strings");
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) return invalid("__metadata__: ", key, " is not a string");
    if (out != nullptr) (*out)[key] = text.get<std::string>();
  }
  return {};
}

std::string errno_text() { return std::strerror(errno); }

Status io_error(const std::filesystem::path& path, const std::string& reason) {
  return error(StatusCode::kIo, path.string(), ": ", reason);
}

const char* name_in_file(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kI32:
      return "I32";
    default:
      return nullptr;
  }
}

}  // namespace

Status in_file(const std::filesystem::path& path, const Status& status) {
  if (status.ok()) return {};
  return error(status.code(), path.string(), ": ", status.message());
}

int64_t TensorEntry::numel() const {
  int64_t count = 1;
  for (int64_t extent : shape) count *= extent;
  return count;
}

std::string shape_text(std::span<const int64_t> shape) {
  std::string out = "[";
  for (int64_t extent : shape) {
    if (out.size() > 1) out += ',';
    out += std::to_string(extent);
  }
  out += ']';
  return out;
}

bool dtype_of(std::string_view name, DType* out) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16, DType::kI32}) {
    if (name == name_in_file(dtype)) {
      *out = dtype;
      return true;
    }
  }
  return false;
}

Status parse_safetensors(std::span<const std::byte> file, std::vector<TensorEntry>* entries,
                         Metadata* metadata) {
  entries->clear();
  if (file.size() < 8) return invalid("got ", file.size(), " bytes, a header needs at least 8");
  const uint64_t header_bytes = load_u64(file.data());
  if (header_bytes > kMaxHeaderBytes || header_bytes > file.size() - 8)
    return invalid("header length: got ", header_bytes, ", the file holds ", file.size() - 8,
                   " bytes behind it (truncated?)");
  const std::string_view header(reinterpret_cast<const char*>(file.data()) + 8,
                                static_cast<size_t>(header_bytes));
  json tree;
  MSA_TRY(parse_header(header, &tree));

  const auto data = file.subspan(8 + static_cast<size_t>(header_bytes));
  for (const auto& [name, value] : tree.items()) {
    if (name == "__metadata__") {
      MSA_TRY(parse_metadata(value, metadata));
      continue;
    }
    MSA_TRY(parse_entry(name, value, data, &entries->emplace_back()));
  }

  // In the order of the data, no entry may begin before the one in front of it ends.
  std::ranges::sort(*entries, {}, [](const TensorEntry& entry) {
    return std::tuple(entry.bytes.data(), entry.bytes.size(), std::string_view(entry.name));
  });
  for (size_t i = 1; i < entries->size(); ++i) {
    const TensorEntry& before = (*entries)[i - 1];
    const TensorEntry& entry = (*entries)[i];
    if (entry.bytes.data() < before.bytes.data() + before.bytes.size())
      return invalid("tensor ", entry.name, ": its bytes overlap those of ", before.name);
  }
  return {};
}

Status read_int32(const TensorEntry& entry, std::vector<int32_t>* out) {
  const bool wide = entry.dtype == "I64";
  if (!wide && entry.dtype != "I32")
    return invalid("tensor ", entry.name, ": dtype: got ", entry.dtype, ", expected I32 or I64");
  out->resize(static_cast<size_t>(entry.numel()));
  if (!wide) {
    if (!out->empty()) std::memcpy(out->data(), entry.bytes.data(), entry.bytes.size());
    return {};
  }
  for (size_t i = 0; i < out->size(); ++i) {
    const auto value = static_cast<int64_t>(load_u64(entry.bytes.data() + 8 * i));
    if (value < std::numeric_limits<int32_t>::min() || value > std::numeric_limits<int32_t>::max())
      return invalid("tensor ", entry.name, ": element ", i, ": got ", value,
                     ", expected a 32-bit value");
    (*out)[i] = static_cast<int32_t>(value);
  }
  return {};
}

Status MappedFile::open(const std::filesystem::path& path, std::unique_ptr<MappedFile>* out) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) return io_error(path, errno_text());
  struct stat info{};
  Status status;
  void* data = nullptr;
  if (::fstat(file, &info) != 0) {
    status = io_error(path, errno_text());
  } else if (!S_ISREG(info.st_mode)) {
    status = io_error(path, "not a regular file");
  } else if (info.st_size > 0) {
    data = ::mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file, 0);
    if (data == MAP_FAILED) status = io_error(path, errno_text());
  }
  ::close(file);
  if (status.ok())
    out->reset(
        new MappedFile(static_cast<const std::byte*>(data), static_cast<size_t>(info.st_size)));
  return status;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

Status SafetensorsFile::open(const std::filesystem::path& path, SafetensorsFile* out) {
  out->path = path;
  MSA_TRY(MappedFile::open(path, &out->file));
  return in_file(path, parse_safetensors(out->file->bytes(), &out->entries, &out->metadata));
}

const TensorEntry* SafetensorsFile::find(std::string_view name) const {
  for (const TensorEntry& entry : entries)
    if (entry.name == name) return &entry;
  return nullptr;
}

Status SafetensorsFile::view(std::string_view name, TensorView* out) const {
  const TensorEntry* entry = find(name);
  if (entry == nullptr) return invalid("tensor ", name, ": not in the file");
  TensorView view;
  if (!dtype_of(entry->dtype, &view.dtype))
    return invalid("tensor ", name, ": dtype: got ", entry->dtype,
                   ", expected F32, BF16, F16 or I32");
  if (entry->shape.empty() || entry->shape.size() > static_cast<size_t>(kMaxRank))
    return invalid("tensor ", name, ": got shape ", shape_text(entry->shape),
                   ", expected 1 to 4 axes");
  if (reinterpret_cast<uintptr_t>(entry->bytes.data()) % static_cast<size_t>(size_of(view.dtype)))
    return invalid("tensor ", name, ": its data is not aligned to its element size");
  view.data = const_cast<std::byte*>(entry->bytes.data());
  view.rank = static_cast<int32_t>(entry->shape.size());
  int64_t step = 1;
  for (size_t i = entry->shape.size(); i-- > 0;) {
    view.shape[i] = entry->shape[i];
    view.stride[i] = step;
    step *= entry->shape[i];
  }
  *out = view;
  return {};
}

Status write_safetensors(std::FILE* stream,
                         std::span<const std::pair<std::string, TensorView>> tensors,
                         const Metadata& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const auto& [name, view] : tensors) {
    const char* dtype = name_in_file(view.dtype);
    if (dtype == nullptr)
      return invalid("tensor ", name, ": dtype: got ", name_of(view.dtype),
                     ", expected f32, bf16, f16 or i32");
    const int64_t bytes = view.numel() * size_of(view.dtype);
    const std::span shape(view.shape.data(), static_cast<size_t>(view.rank));
    header[name] = {{"dtype", dtype},
                    {"shape", std::vector<int64_t>(shape.begin(), shape.end())},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump(-1, ' ', false, json::error_handler_t::replace);
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data starts aligned

  std::array<unsigned char, 8> length{};
  for (size_t i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(text.size() >> (8 * i));
  bool ok = std::fwrite(length.data(), 1, 8, stream) == 8 &&
            std::fwrite(text.data(), 1, text.size(), stream) == text.size();
  for (const auto& [name, view] : tensors) {
    const auto bytes = static_cast<size_t>(view.numel() * size_of(view.dtype));
    ok = ok && (bytes == 0 || std::fwrite(view.data, 1, bytes, stream) == bytes);
  }
  return ok ? Status() : error(StatusCode::kIo, errno_text());
}

}  // namespace msa::model
