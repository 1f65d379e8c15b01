// Builds without the CUDA backend.
#include "core/text.h"
#include "model/compute.h"

namespace msa::model {

Status make_cuda_compute(DType, std::unique_ptr<Compute>*) {
  return error(StatusCode::kUnavailable, "this build has no CUDA backend");
}

}  // namespace msa::model
