// The one implementation of Model, for the session behind it.
#pragma once

#include <memory>

#include "model/compute.h"
#include "model/model.h"
#include "model/weights.h"

namespace msa::model {

class LoadedModel final : public Model {
 public:
  Status load(const std::filesystem::path& directory, const LoadOptions& options);

  const Config& config() const override { return config_; }
  const LoadOptions& options() const override { return options_; }
  DType dtype() const override { return dtype_; }
  const char* backend_name() const override { return backend_->name; }
  int threads() const override { return compute_->threads(); }

  /// Computing does not change the model, but one session at a time may compute.
  Compute& compute() const { return *compute_; }
  const Weights& weights() const { return weights_; }

 private:
  Config config_;
  LoadOptions options_;
  DType dtype_ = DType::kF32;
  const Backend* backend_ = nullptr;
  std::unique_ptr<Compute> compute_;
  Weights weights_;
};

}  // namespace msa::model
