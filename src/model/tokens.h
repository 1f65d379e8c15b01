// Where token ids come from: bytes of a text, .npy files, safetensors files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "msa/status.h"

namespace msa::model {

/// A one-dimensional little-endian int32 array in NumPy's format, versions 1 to 3.
Status parse_npy(std::span<const std::byte> file, std::vector<int32_t>* out);

/// `.npy` as above, or a safetensors file with a single I32 or I64 tensor (told by the content).
Status parse_token_ids(std::span<const std::byte> file, std::vector<int32_t>* out);

/// parse_token_ids of a file. Errors carry the path.
Status read_token_ids(const std::filesystem::path& path, std::vector<int32_t>* out);

/// The bytes of a text as ids.
std::vector<int32_t> tokens_of(std::string_view text);

}  // namespace msa::model
