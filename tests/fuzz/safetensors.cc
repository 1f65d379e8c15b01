// Any bytes are a safetensors file or an error; what is found lies inside the bytes.
#include "model/safetensors.h"

#include <cstdlib>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto file = std::as_bytes(std::span(data, size));
  std::vector<msa::model::TensorEntry> entries;
  msa::model::Metadata metadata;
  const msa::Status status = msa::model::parse_safetensors(file, &entries, &metadata);
  if (!status) {
    if (status.message().empty()) std::abort();
    return 0;
  }
  const std::byte* end = file.data();
  for (const msa::model::TensorEntry& entry : entries) {
    const bool inside =
        entry.bytes.empty() || (entry.bytes.data() >= end &&  // in order, apart
                                entry.bytes.size() <= size &&
                                entry.bytes.data() + entry.bytes.size() <= file.data() + size);
    if (!inside || entry.numel() < 0) std::abort();
    if (!entry.bytes.empty()) end = entry.bytes.data() + entry.bytes.size();
    std::vector<int32_t> values;
    if (msa::model::read_int32(entry, &values) &&
        values.size() != static_cast<size_t>(entry.numel())) {
      std::abort();
    }
  }
  return 0;
}
