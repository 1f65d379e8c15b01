#include "model/model.h"

#include <cstdlib>
#include <string_view>

#include "core/text.h"
#include "model/attention.h"
#include "model/loaded_model.h"
#include "model/safetensors.h"

namespace msa::model {
namespace {

/// Where a model runs: on the named backend's device; with "auto" on the GPU if there is one.
Device device_of(std::string_view name) {
  const char* forced = std::getenv("MSA_BACKEND");
  if ((name.empty() || name == "auto") && forced != nullptr) name = forced;
  const bool automatic = name.empty() || name == "auto";
  for (const Backend* backend : backends()) {
    if (automatic ? backend->usable().ok() : name == backend->name)
      return {.kind = backend->device};
  }
  return {};  // choose_backend() explains unknown names
}

}  // namespace

Status LoadedModel::load(const std::filesystem::path& directory, const LoadOptions& options) {
  options_ = options;
  const Device device = device_of(options.backend);
  const bool cuda = device.kind == DeviceKind::kCUDA;
  dtype_ = options.dtype.value_or(cuda ? DType::kBF16 : DType::kF32);
  if (dtype_ != DType::kF32 && dtype_ != DType::kBF16)
    return error(StatusCode::kUnsupported, "dtype: got ", name_of(dtype_),
                 ", supported are f32 and bf16");
  const std::filesystem::path path = directory / "config.json";
  std::unique_ptr<MappedFile> file;
  MSA_TRY(MappedFile::open(path, &file));
  MSA_TRY(in_file(path, parse_config(file->text(), &config_)));
  if (options.topk != 0) {
    config_.topk = options.topk;
    MSA_TRY(validate(config_));
  }

  const Op op = config_.sparse_layers() > 0 ? Op::kSparseAttention : Op::kDenseAttention;
  MSA_TRY(
      choose_backend(attention_problem(config_, dtype_, device, op), options.backend, &backend_));
  if (cuda) {
    MSA_TRY(make_cuda_compute(dtype_, &compute_));
  } else {
    compute_ = make_cpu_compute(options.threads);
  }
  return load_weights(directory, config_, *compute_, &weights_);
}

Status Model::load(const std::filesystem::path& directory, const LoadOptions& options,
                   std::unique_ptr<Model>* out) {
  auto model = std::make_unique<LoadedModel>();
  MSA_TRY(model->load(directory, options));
  *out = std::move(model);
  return {};
}

}  // namespace msa::model
