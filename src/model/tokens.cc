#include "model/tokens.h"

#include <charconv>
#include <cstring>
#include <limits>
#include <memory>
#include <string_view>

#include "core/text.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

constexpr std::string_view kNpyMagic = "\x93NUMPY";

std::string_view chars(std::span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// The text behind `'key':` in the header's Python dictionary, or nothing.
std::string_view value_of(std::string_view header, std::string_view key) {
  const size_t at = header.find(key);
  if (at == std::string_view::npos) return {};
  const size_t colon = header.find(':', at + key.size());
  if (colon == std::string_view::npos) return {};
  const size_t start = header.find_first_not_of(' ', colon + 1);
  return start == std::string_view::npos ? std::string_view{} : header.substr(start);
}

// "(123,)" -> 123.
bool parse_extent(std::string_view shape, int64_t* out) {
  if (!shape.starts_with('(')) return false;
  shape.remove_prefix(1);
  const auto [end, failed] = std::from_chars(shape.data(), shape.data() + shape.size(), *out);
  if (failed != std::errc{} || *out < 0) return false;
  shape.remove_prefix(static_cast<size_t>(end - shape.data()));
  return shape.starts_with(",)") || shape.starts_with(", )");
}

}  // namespace

Status parse_npy(std::span<const std::byte> file, std::vector<int32_t>* out) {
  out->clear();
  const auto byte = [&](size_t i) { return std::to_integer<size_t>(file[i]); };
  if (!chars(file).starts_with(kNpyMagic) || file.size() < 10)
    return invalid("not a .npy file (magic bytes missing)");
  const size_t version = byte(6);
  if (version < 1 || version > 3)
    return invalid(".npy version: got ", version, ", expected 1 to 3");
  const size_t prefix = version == 1 ? 10 : 12;
  if (file.size() < prefix) return invalid("truncated .npy header");
  const size_t length = version == 1 ? byte(8) | byte(9) << 8
                                     : byte(8) | byte(9) << 8 | byte(10) << 16 | byte(11) << 24;
  if (length > file.size() - prefix) return invalid("truncated .npy header");

  const std::string_view header = chars(file.subspan(prefix, length));
  if (!value_of(header, "'descr'").starts_with("'<i4'"))
    return invalid("dtype of the .npy file: expected little-endian int32 ('<i4')");
  int64_t count = 0;
  if (!parse_extent(value_of(header, "'shape'"), &count))
    return invalid("shape of the .npy file: expected one dimension");
  const auto data = file.subspan(prefix + length);
  if (static_cast<uint64_t>(count) != data.size() / sizeof(int32_t) || data.size() % 4 != 0)
    return invalid("the .npy file promises ", count, " ids, but holds ", data.size(), " bytes");
  out->resize(static_cast<size_t>(count));
  if (count > 0) std::memcpy(out->data(), data.data(), data.size());
  return {};
}

Status parse_token_ids(std::span<const std::byte> file, std::vector<int32_t>* out) {
  if (chars(file).starts_with(kNpyMagic)) return parse_npy(file, out);
  std::vector<TensorEntry> entries;
  MSA_TRY(parse_safetensors(file, &entries));
  if (entries.size() != 1)
    return invalid("token ids: got ", entries.size(), " tensors, expected a single one");
  return read_int32(entries[0], out);
}

Status read_token_ids(const std::filesystem::path& path, std::vector<int32_t>* out) {
  std::unique_ptr<MappedFile> file;
  MSA_TRY(MappedFile::open(path, &file));
  return in_file(path, parse_token_ids(file->bytes(), out));
}

std::vector<int32_t> tokens_of(std::string_view text) {
  std::vector<int32_t> ids;
  ids.reserve(text.size());
  for (char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

}  // namespace msa::model
