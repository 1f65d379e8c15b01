// Matrix products of a model on CUDA, by cuBLASLt: loaded when the first model asks for it, so that
// the command starts on machines without it.
#pragma once

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <map>
#include <string>

#include "core/text.h"
#include "msa/tensor.h"

namespace msa::model {

/// The functions of cuBLASLt that are used, by name.
class CublasLt {
  /// Becomes a pointer to a function of the type that is asked for.
  struct Symbol {
    void* at;
    template <class Function>
    operator Function*() const {
      return reinterpret_cast<Function*>(at);
    }
  };

  std::string name_ = text("libcublasLt.so.", CUBLAS_VER_MAJOR);
  void* library_ = open();
  bool complete_ = true;

  void* open() const {
    void* library = dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
    return library != nullptr ? library : dlopen("libcublasLt.so", RTLD_NOW | RTLD_LOCAL);
  }
  Symbol find(const char* function) {
    void* at = library_ != nullptr ? dlsym(library_, function) : nullptr;
    complete_ = complete_ && at != nullptr;
    return {at};
  }

 public:
  decltype(&cublasLtCreate) create = find("cublasLtCreate");
  decltype(&cublasLtDestroy) destroy = find("cublasLtDestroy");
  decltype(&cublasLtMatmul) matmul = find("cublasLtMatmul");
  decltype(&cublasLtMatmulDescCreate) create_product = find("cublasLtMatmulDescCreate");
  decltype(&cublasLtMatmulDescDestroy) destroy_product = find("cublasLtMatmulDescDestroy");
  decltype(&cublasLtMatmulDescSetAttribute) set_product = find("cublasLtMatmulDescSetAttribute");
  decltype(&cublasLtMatrixLayoutCreate) create_layout = find("cublasLtMatrixLayoutCreate");
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = find("cublasLtMatrixLayoutDestroy");
  decltype(&cublasLtMatmulPreferenceCreate) create_preference =
      find("cublasLtMatmulPreferenceCreate");
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference =
      find("cublasLtMatmulPreferenceDestroy");
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference =
      find("cublasLtMatmulPreferenceSetAttribute");
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = find("cublasLtMatmulAlgoGetHeuristic");

  Status loaded() const {
    if (library_ == nullptr)
      return error(StatusCode::kUnavailable, "models on CUDA need ", name_,
                   " of the CUDA toolkit: ", dlerror());
    if (complete_) return {};
    return error(StatusCode::kUnavailable, name_, " lacks a function that models on CUDA need");
  }
};

inline Status blas_status(cublasStatus_t result, const char* what) {
  if (result == CUBLAS_STATUS_SUCCESS) return {};
  return error(StatusCode::kInternal, what, ": cuBLASLt error ", static_cast<int>(result));
}

/// Operands in f32 or bf16, results in f32.
class CudaProducts {
 public:
  static constexpr int64_t kWorkspaceBytes = 32 << 20;  // what cuBLAS recommends for Hopper

  explicit CudaProducts(DType dtype) : dtype_(dtype) {}
  CudaProducts(const CudaProducts&) = delete;
  CudaProducts& operator=(const CudaProducts&) = delete;
  ~CudaProducts() {
    for (auto& [shape, product] : products_) destroy(product);
    if (handle_ != nullptr) blas_.destroy(handle_);
  }
  /// Before the first product. Errors: kUnavailable without cuBLASLt.
  Status open() {
    MSA_TRY(blas_.loaded());
    return blas_status(blas_.create(&handle_), "cublasLtCreate");
  }

  /// Enqueues y [rows,n] = x [rows,k] w^T, w [n,k]; workspace: kWorkspaceBytes on the device.
  Status multiply(const void* w, int64_t n, int64_t k, const void* x, int64_t rows, float* y,
                  void* workspace, cudaStream_t stream) {
    const Product* p = nullptr;
    MSA_TRY(find(n, rows, k, &p));
    const float one = 1, zero = 0;
    return blas_status(blas_.matmul(handle_, p->operation, &one, w, p->w, x, p->x, &zero, y, p->y,
                                    y, p->y, &p->algorithm, workspace, kWorkspaceBytes, stream),
                       "cublasLtMatmul");
  }

 private:
  /// y^T [n,rows] = w [n,k] x^T in cuBLAS' column-major words: both operands have k innermost.
  struct Product {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
  };

  Status find(int64_t n, int64_t rows, int64_t k, const Product** out) {
    const auto [entry, is_new] = products_.try_emplace({n, rows, k});
    Product& product = entry->second;
    *out = &product;
    if (!is_new) return {};
    const Status status = make(n, rows, k, &product);
    if (!status) {
      destroy(product);
      products_.erase(entry);
    }
    return status;
  }

  Status make(int64_t n, int64_t rows, int64_t k, Product* p) {
    const cudaDataType_t type = dtype_ == DType::kF32 ? CUDA_R_32F : CUDA_R_16BF;
    const cublasOperation_t transposed = CUBLAS_OP_T;
    MSA_TRY(blas_status(blas_.create_product(&p->operation, CUBLAS_COMPUTE_32F, CUDA_R_32F),
                        "cublasLtMatmulDescCreate"));
    MSA_TRY(blas_status(blas_.set_product(p->operation, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                          sizeof transposed),
                        "cublasLtMatmulDescSetAttribute"));
    const auto layout = [&](cublasLtMatrixLayout_t* out, cudaDataType_t t, int64_t height,
                            int64_t width) {
      return blas_status(blas_.create_layout(out, t, static_cast<uint64_t>(height),
                                             static_cast<uint64_t>(width), height),
                         "cublasLtMatrixLayoutCreate");
    };
    MSA_TRY(layout(&p->w, type, k, n));
    MSA_TRY(layout(&p->x, type, k, rows));
    MSA_TRY(layout(&p->y, CUDA_R_32F, n, rows));
    cublasLtMatmulPreference_t preference = nullptr;
    MSA_TRY(blas_status(blas_.create_preference(&preference), "cublasLtMatmulPreferenceCreate"));
    const uint64_t limit = kWorkspaceBytes;
    blas_.set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit,
                         sizeof limit);
    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t result = blas_.heuristic(handle_, p->operation, p->w, p->x, p->y, p->y,
                                                  preference, 1, &found, &count);
    blas_.destroy_preference(preference);
    MSA_TRY(blas_status(result, "cublasLtMatmulAlgoGetHeuristic"));
    if (count == 0)
      return error(StatusCode::kInternal, "cuBLASLt has no product of [", rows, ",", k, "] and [",
                   n, ",", k, "]^T");
    p->algorithm = found.algo;
    return {};
  }

  void destroy(Product& p) {
    for (cublasLtMatrixLayout_t layout : {p.w, p.x, p.y})
      if (layout != nullptr) blas_.destroy_layout(layout);
    if (p.operation != nullptr) blas_.destroy_product(p.operation);
  }

  DType dtype_;
  CublasLt blas_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<std::array<int64_t, 3>, Product> products_;  // by n, rows, k
};

}  // namespace msa::model
