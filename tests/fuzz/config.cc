// Any text is a config.json that keeps its promises, or an error.
#include "model/config.h"

#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  msa::model::Config config;
  const std::string_view json(reinterpret_cast<const char*>(data), size);
  const msa::Status status = msa::model::parse_config(json, &config);
  if (status ? !msa::model::validate(config).ok() : status.message().empty()) std::abort();
  return 0;
}
