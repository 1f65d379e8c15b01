// cuBLASLt, loaded by name: a program that uses it starts on machines without it.
#pragma once

#include <cublasLt.h>
#include <dlfcn.h>

#include <string>
#include <type_traits>

#include "core/text.h"
#include "msa/status.h"

namespace msa::model {

/// The functions of cuBLASLt that are used, by name.
struct CublasLt {
  decltype(&cublasLtCreate) create = nullptr;
  decltype(&cublasLtDestroy) destroy = nullptr;
  decltype(&cublasLtMatmul) matmul = nullptr;
  decltype(&cublasLtMatmulDescCreate) create_product = nullptr;
  decltype(&cublasLtMatmulDescDestroy) destroy_product = nullptr;
  decltype(&cublasLtMatmulDescSetAttribute) set_product = nullptr;
  decltype(&cublasLtMatrixLayoutCreate) create_layout = nullptr;
  decltype(&cublasLtMatrixLayoutDestroy) destroy_layout = nullptr;
  decltype(&cublasLtMatmulPreferenceCreate) create_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceDestroy) destroy_preference = nullptr;
  decltype(&cublasLtMatmulPreferenceSetAttribute) set_preference = nullptr;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic = nullptr;

  Status load() {
    const std::string versioned = text("libcublasLt.so.", CUBLAS_VER_MAJOR);
    void* library = dlopen(versioned.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) library = dlopen("libcublasLt.so", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr)
      return error(StatusCode::kUnavailable, "models on CUDA need ", versioned,
                   " of the CUDA toolkit: ", dlerror());
    bool complete = true;
    const auto find = [&](const char* name, auto* function) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      complete = complete && *function != nullptr;
    };
    find("cublasLtCreate", &create);
    find("cublasLtDestroy", &destroy);
    find("cublasLtMatmul", &matmul);
    find("cublasLtMatmulDescCreate", &create_product);
    find("cublasLtMatmulDescDestroy", &destroy_product);
    find("cublasLtMatmulDescSetAttribute", &set_product);
    find("cublasLtMatrixLayoutCreate", &create_layout);
    find("cublasLtMatrixLayoutDestroy", &destroy_layout);
    find("cublasLtMatmulPreferenceCreate", &create_preference);
    find("cublasLtMatmulPreferenceDestroy", &destroy_preference);
    find("cublasLtMatmulPreferenceSetAttribute", &set_preference);
    find("cublasLtMatmulAlgoGetHeuristic", &heuristic);
    if (complete) return {};
    return error(StatusCode::kUnavailable, versioned, " lacks a function that models on CUDA need");
  }
};

}  // namespace msa::model
