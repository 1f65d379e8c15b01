// What a hook sees of a tensor: the tensor itself on the CPU, else a copy in host memory.
#pragma once

#include <vector>

#include "model/compute.h"

namespace msa::model {

class HostView {
 public:
  /// `tensor` is contiguous.
  HostView(Compute& compute, const TensorView& tensor)
      : compute_(compute), tensor_(tensor), view_(tensor) {
    if (tensor.device.kind == DeviceKind::kCPU) return;
    copy_.resize(static_cast<size_t>(bytes()));
    compute.copy(copy_.data(), tensor.data, bytes());
    view_.data = copy_.data();
    view_.device = {};
  }

  const TensorView& view() const { return view_; }
  /// Makes changes to the view changes of the tensor.
  void write_back() {
    if (!copy_.empty()) compute_.copy(tensor_.data, copy_.data(), bytes());
  }

 private:
  int64_t bytes() const { return tensor_.numel() * size_of(tensor_.dtype); }

  Compute& compute_;
  TensorView tensor_, view_;
  std::vector<std::byte> copy_;
};

}  // namespace msa::model
