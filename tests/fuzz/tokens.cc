// Any bytes are a file of token ids or an error, and never more ids than bytes allow.
#include "model/tokens.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::vector<int32_t> ids;
  const msa::Status status =
      msa::model::parse_token_ids(std::as_bytes(std::span(data, size)), &ids);
  if (status ? ids.size() * sizeof(int32_t) > size : status.message().empty()) std::abort();
  return 0;
}
