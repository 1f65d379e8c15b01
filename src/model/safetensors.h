// Safetensors files: a checked parser over memory, a memory-mapped file, and a writer.
//
// Layout: 8 bytes little-endian header length, a JSON object
// {"name": {"dtype": "F32", "shape": [2,3], "data_offsets": [begin,end]}, ...}, then the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "msa/status.h"
#include "msa/tensor.h"

namespace msa::model {

/// One entry of a header whose byte range was checked against dtype, shape and file.
struct TensorEntry {
  std::string name;
  std::string dtype;  ///< as in the file: "F32", "BF16", "I64", ...
  std::vector<int64_t> shape;
  std::span<const std::byte> bytes;  ///< into the parsed memory; not necessarily aligned

  int64_t numel() const;
};

using Metadata = std::map<std::string, std::string>;

/// The same with the path of a file in front of an error.
Status in_file(const std::filesystem::path& path, const Status& status);

/// "[2,3]".
std::string shape_text(std::span<const int64_t> shape);

/// f32, bf16, f16 and i32 have a DType; false for every other dtype of the format.
bool dtype_of(std::string_view name, DType* out);

/// Parses a whole file in memory. Entries come in the order of their data. Holes between tensors
/// are legal; a truncated file, a duplicated name, a byte range out of the file, over another one
/// or of the wrong size for dtype and shape is not. Never reads outside `file`.
Status parse_safetensors(std::span<const std::byte> file, std::vector<TensorEntry>* entries,
                         Metadata* metadata = nullptr);

/// Values of an I32 or I64 entry. Errors: another dtype, a value outside int32.
Status read_int32(const TensorEntry& entry, std::vector<int32_t>* out);

/// A file mapped into memory, read only.
class MappedFile {
 public:
  static Status open(const std::filesystem::path& path, std::unique_ptr<MappedFile>* out);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}
  const std::byte* data_;
  size_t size_;
};

/// A mapped safetensors file: entries stay valid as long as it lives.
struct SafetensorsFile {
  std::filesystem::path path;
  std::unique_ptr<MappedFile> file;
  std::vector<TensorEntry> entries;
  Metadata metadata;

  /// Errors carry the path.
  static Status open(const std::filesystem::path& path, SafetensorsFile* out);
  const TensorEntry* find(std::string_view name) const;
  /// View of f32, bf16, f16 or i32 data of rank 1..4, in the mapping itself.
  /// Errors: no such tensor, another dtype, a higher rank, or data that is not aligned.
  Status view(std::string_view name, TensorView* out) const;
};

/// Writes contiguous f32, bf16, f16 or i32 views in the given order. The stream stays open, and
/// what it buffers is the caller's to flush.
Status write_safetensors(std::FILE* stream,
                         std::span<const std::pair<std::string, TensorView>> tensors,
                         const Metadata& metadata = {});

}  // namespace msa::model
