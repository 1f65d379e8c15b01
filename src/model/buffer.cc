#include <algorithm>

#include "core/text.h"
#include "model/compute.h"

namespace msa::model {

Status Buffer::create(Compute& compute, int64_t bytes, Buffer* out) {
  out->data_ = {compute.allocate(std::max<int64_t>(bytes, 1)), {&compute}};
  out->bytes_ = bytes;
  if (out->data() != nullptr) return {};
  return error(StatusCode::kUnavailable, "cannot allocate ", bytes, " bytes");
}

Status Buffer::create(Compute& compute, std::span<const float> values, Buffer* out) {
  MSA_TRY(create(compute, static_cast<int64_t>(values.size_bytes()), out));
  compute.copy(out->data(), values.data(), out->bytes());
  return {};
}

void Buffer::Release::operator()(void* data) const { compute->release(data); }

}  // namespace msa::model
