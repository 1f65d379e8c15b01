// Error texts: error(code, "topk: got ", k, ", expected >= 1").
#pragma once

#include <sstream>

#include "msa/status.h"

namespace msa {

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
Status error(StatusCode code, const Parts&... parts) {
  return Status(code, text(parts...));
}

template <class... Parts>
Status invalid(const Parts&... parts) {
  return Status(StatusCode::kInvalidArgument, text(parts...));
}

}  // namespace msa
