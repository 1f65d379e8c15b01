// The CUDA device. Matrix products come from cuBLASLt, loaded when the first model asks for it, so
// that the command starts on machines without it; everything else is a few plain kernels: they are
// bound by memory, and a small part of a layer beside its products and its attention.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "core/half.h"
#include "core/text.h"
#include "cuda/launch.h"
#include "model/compute.h"
#include "model/cublas_lt.h"

namespace msa::model {
namespace {

constexpr int kThreads = 256;  // of a block; a row of a norm or a softmax has one block

// ---- kernels; grids are one block per row, or flat over elements ----

__device__ void store(void* y, DType dtype, int64_t i, float value) {
  if (dtype == DType::kF32)
    static_cast<float*>(y)[i] = value;
  else if (dtype == DType::kBF16)
    static_cast<__nv_bfloat16*>(y)[i] = __float2bfloat16(value);
  else
    static_cast<__half*>(y)[i] = __float2half(value);
}

/// Sum over the block, in an order that does not change; every thread gets it.
template <class T>
__device__ T block_sum(T value) {
  __shared__ T parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    __syncthreads();
  }
  const T sum = parts[0];
  __syncthreads();
  return sum;
}

__device__ float block_max(float value) {
  __shared__ float parts[kThreads];
  parts[threadIdx.x] = value;
  __syncthreads();
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x < half)
      parts[threadIdx.x] = fmaxf(parts[threadIdx.x], parts[threadIdx.x + half]);
    __syncthreads();
  }
  const float top = parts[0];
  __syncthreads();
  return top;
}

/// What CudaCompute::bad_row() tells: the lowest key of a row and `call`.
struct BadRows {
  unsigned long long* first;
  int64_t call;

  /// By every thread of a block, all with the same `mean`. The key is that of BadRow::key, which
  /// device code may not call.
  __device__ void note(int64_t row, float mean) const {
    if (threadIdx.x == 0 && !isfinite(mean))
      atomicMin(first, static_cast<unsigned long long>(row) << 32 | call);
  }
};

__global__ void embed_rows(const float* table, const int32_t* ids, int64_t dim, float* y) {
  const float* from = table + ids[blockIdx.x] * dim;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) y[blockIdx.x * dim + i] = from[i];
}

__global__ void add_norm_rows(const float* weight, float eps, int64_t dim, float* x,
                              const float* delta, float* y, BadRows bad_rows) {
  const int64_t begin = blockIdx.x * dim;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    if (delta != nullptr) x[begin + i] += delta[begin + i];
    squares += x[begin + i] * x[begin + i];
  }
  const float mean = block_sum(squares) / static_cast<float>(dim);
  bad_rows.note(blockIdx.x, mean);
  const float scale = rsqrtf(mean + eps);
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x)
    y[begin + i] = x[begin + i] * scale * (1.0f + weight[i]);
}

/// Frequency and angle are rounded to f32, as the model was trained.
__global__ void angle_rows(int64_t first, int32_t rotary_dim, double theta, float* turns) {
  const int32_t half = rotary_dim / 2;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < half;
       i += static_cast<int32_t>(blockDim.x)) {
    const float frequency = 1.0f / static_cast<float>(pow(theta, double(2 * i) / rotary_dim));
    const float angle = static_cast<float>(first + blockIdx.x) * frequency;
    turns[blockIdx.x * rotary_dim + i] = cosf(angle);
    turns[blockIdx.x * rotary_dim + half + i] = sinf(angle);
  }
}

/// One block per (row, head): x [rows,heads,dim].
__global__ void norm_rope_heads(const float* weight, float eps, int64_t dim, const float* x,
                                const float* turns, int32_t rotary_dim, void* y, DType dtype,
                                BadRows bad_rows) {
  const int64_t begin = (int64_t{blockIdx.x} * gridDim.y + blockIdx.y) * dim;
  float squares = 0;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) squares += x[begin + i] * x[begin + i];
  const float mean = block_sum(squares) / static_cast<float>(dim);
  bad_rows.note(blockIdx.x, mean);
  const float scale = rsqrtf(mean + eps);
  const auto normed = [&](int64_t i) { return x[begin + i] * scale * (1.0f + weight[i]); };
  const float* cosines = turns + int64_t{blockIdx.x} * rotary_dim;
  const int32_t half = rotary_dim / 2;
  const float* sines = cosines + half;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) {
    float value = normed(i);
    if (i < half)
      value = value * cosines[i] - normed(i + half) * sines[i];
    else if (i < rotary_dim)
      value = value * cosines[i - half] + normed(i - half) * sines[i - half];
    store(y, dtype, begin + i, value);
  }
}

__global__ void convert_elements(const float* x, int64_t count, void* y, DType dtype) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < count) store(y, dtype, i, x[i]);
}

__global__ void swiglu_rows(const float* x, int64_t n, float alpha, float limit, float* y) {
  const float* gate = x + 2 * n * blockIdx.x;
  const float* up = gate + n;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    // Comparisons keep NaN, fminf and fmaxf drop it.
    const float g = gate[i] > limit ? limit : gate[i];
    const float u = up[i] < -limit ? -limit : up[i] > limit ? limit : up[i];
    y[n * blockIdx.x + i] = (u + 1.0f) * g / (1.0f + expf(-alpha * g));
  }
}

__global__ void gather_rows(const float* x, const int32_t* rows, int64_t dim, float* y) {
  const float* from = x + rows[blockIdx.x] * dim;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) y[blockIdx.x * dim + i] = from[i];
}

__global__ void scatter_add_rows(const float* x, const int32_t* rows, const float* weights,
                                 float scale, int64_t dim, float* y) {
  const float weight = scale * weights[blockIdx.x];
  float* to = y + rows[blockIdx.x] * dim;
  for (int64_t i = threadIdx.x; i < dim; i += blockDim.x) to[i] += weight * x[blockIdx.x * dim + i];
}

__global__ void cross_entropy_rows(const float* logits, const int32_t* targets, int64_t vocab,
                                   float* nats) {
  const float* line = logits + blockIdx.x * vocab;
  float top = -INFINITY;
  for (int64_t i = threadIdx.x; i < vocab; i += blockDim.x) top = fmaxf(top, line[i]);
  top = block_max(top);
  double sum = 0;
  for (int64_t i = threadIdx.x; i < vocab; i += blockDim.x) sum += expf(line[i] - top);
  sum = block_sum(sum);
  if (threadIdx.x == 0)
    nats[blockIdx.x] = static_cast<float>(log(sum) - double(line[targets[blockIdx.x]] - top));
}

// ---- the device ----

/// A weight [n,k] in the products' dtype.
class CudaMatrix final : public Matrix {
 public:
  CudaMatrix(Compute& compute, int64_t n, int64_t k) : compute_(compute), n_(n), k_(k) {}
  ~CudaMatrix() override { compute_.release(data); }
  CudaMatrix(const CudaMatrix&) = delete;
  CudaMatrix& operator=(const CudaMatrix&) = delete;
  int64_t rows() const override { return n_; }
  int64_t columns() const override { return k_; }

  void* data = nullptr;

 private:
  Compute& compute_;
  int64_t n_, k_;
};

/// Errors inside a function are kept and told by wait(): the functions of Compute return nothing.
class CudaCompute final : public Compute {
 public:
  explicit CudaCompute(DType dtype) : dtype_(dtype) {}
  CudaCompute(const CudaCompute&) = delete;
  CudaCompute& operator=(const CudaCompute&) = delete;

  Status create() {
    MSA_TRY(blas_.load());
    MSA_TRY(cuda::check_cuda(cudaGetDevice(&device_), "cudaGetDevice"));
    MSA_TRY(cuda::check_cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                             "cudaStreamCreate"));
    MSA_TRY(blas_status(blas_.create(&handle_), "cublasLtCreate"));
    MSA_TRY(Buffer::create(*this, kBlasWorkspace, &blas_workspace_));
    MSA_TRY(Buffer::create(*this, sizeof BadRow::kNone, &first_bad_));
    copy(first_bad_.data(), &BadRow::kNone, sizeof BadRow::kNone);
    return status_;
  }
  ~CudaCompute() override {
    for (auto& [shape, product] : products_) destroy(product);
    blas_workspace_ = {};
    first_bad_ = {};
    staged_ = {};
    rounded_ = {};
    if (handle_ != nullptr) blas_.destroy(handle_);
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  Device device() const override { return {.kind = DeviceKind::kCUDA, .id = device_}; }
  Queue queue() override { return {.cuda_stream = stream_}; }
  int threads() const override { return 1; }
  int64_t chunk_rows() const override { return 8192; }
  Status wait() override {
    keep(cuda::check_cuda(cudaStreamSynchronize(stream_), "a kernel of the model"));
    return status_;
  }

  void* allocate(int64_t bytes) override {
    void* data = nullptr;
    if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
      cudaGetLastError();  // told by the null
      return nullptr;
    }
    return data;
  }
  void release(void* data) override { cudaFree(data); }

  void copy(void* to, const void* from, int64_t bytes) override {
    keep(cuda::check_cuda(
        cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault, stream_),
        "a copy of the model"));
    keep(cuda::check_cuda(cudaStreamSynchronize(stream_), "a copy of the model"));
  }

  std::unique_ptr<Matrix> upload(const void* w, DType dtype, int64_t n, int64_t k) override {
    auto matrix = std::make_unique<CudaMatrix>(*this, n, k);
    const int64_t count = n * k;
    std::vector<std::byte> rounded(static_cast<size_t>(count * size_of(dtype_)));
    for (int64_t i = 0; i < count; ++i) store_f32(rounded.data(), dtype_, i, load_f32(w, dtype, i));
    matrix->data = allocate(std::max<int64_t>(1, static_cast<int64_t>(rounded.size())));
    if (matrix->data == nullptr) {
      keep(error(StatusCode::kUnavailable, "cannot allocate a weight of ", rounded.size(),
                 " bytes on the GPU"));
    } else {
      copy(matrix->data, rounded.data(), static_cast<int64_t>(rounded.size()));
    }
    return matrix;
  }

  void matmul(const Matrix& w, const float* x, int64_t rows, float* y) override {
    const auto& weight = static_cast<const CudaMatrix&>(w);
    if (rows == 0 || !status_) return;
    const int64_t n = weight.rows(), k = weight.columns();
    const void* operand = x;
    if (dtype_ != DType::kF32) {
      if (!reserve(rows * k * size_of(dtype_), &rounded_)) return;
      convert(x, rows * k, rounded_.data(), dtype_);
      operand = rounded_.data();
    }
    const Product* product = nullptr;
    if (!keep(find_product(n, rows, k, &product))) return;
    const float one = 1, zero = 0;
    keep(blas_status(
        blas_.matmul(handle_, product->operation, &one, weight.data, product->w, operand,
                     product->x, &zero, y, product->y, y, product->y, &product->algorithm,
                     blas_workspace_.data(), kBlasWorkspace, stream_),
        "cublasLtMatmul"));
  }

  void embed(const Buffer& table, std::span<const int32_t> ids, int64_t dim, float* y) override {
    if (const auto* staged = stage<int32_t>({ids.data(), ids.size()}))
      start("embed", embed_rows, ids.size(), table.f32(), staged, dim, y);
  }
  void add_norm(const Norm& norm, float* x, const float* delta, int64_t rows, float* y) override {
    start("add_norm", add_norm_rows, rows, norm.weight.f32(), norm.eps, norm.dim, x, delta, y,
          next_norm());
  }
  void rope_angles(int64_t first, int64_t rows, int32_t rotary_dim, double theta,
                   float* turns) override {
    start("rope_angles", angle_rows, rows, first, rotary_dim, theta, turns);
  }
  void norm_rope(const Norm& norm, float* x, int64_t rows, int64_t heads, const float* turns,
                 int32_t rotary_dim, void* y, DType dtype) override {
    keep(cuda::launch("norm_rope", norm_rope_heads,
                      {.grid = dim3(unsigned(rows), unsigned(heads)), .block = 128}, stream_,
                      norm.weight.f32(), norm.eps, norm.dim, x, turns, rotary_dim, y, dtype,
                      next_norm()));
  }
  void convert(const float* x, int64_t count, void* y, DType dtype) override {
    start("convert", convert_elements, cuda::ceil_div(count, kThreads), x, count, y, dtype);
  }
  void swiglu(const float* x, int64_t rows, int64_t n, float alpha, float limit,
              float* y) override {
    start("swiglu", swiglu_rows, rows, x, n, alpha, limit, y);
  }
  void gather(const float* x, std::span<const int32_t> rows, int64_t dim, float* y) override {
    if (const auto* staged = stage<int32_t>({rows.data(), rows.size()}))
      start("gather", gather_rows, rows.size(), x, staged, dim, y);
  }
  void scatter_add(const float* x, std::span<const int32_t> rows, std::span<const float> weights,
                   float scale, int64_t dim, float* y) override {
    std::vector<int32_t> both(2 * rows.size());  // rows, then the bits of the weights
    std::copy(rows.begin(), rows.end(), both.begin());
    std::transform(weights.begin(), weights.end(), both.begin() + rows.size(),
                   [](float weight) { return std::bit_cast<int32_t>(weight); });
    if (const auto* staged = stage<int32_t>(both))
      start("scatter_add", scatter_add_rows, rows.size(), x, staged,
            reinterpret_cast<const float*>(staged + rows.size()), scale, dim, y);
  }
  void cross_entropy(const float* logits, std::span<const int32_t> targets, int64_t vocab,
                     float* nats) override {
    const auto* staged = stage<int32_t>({targets.data(), targets.size()});
    if (staged == nullptr || !reserve(static_cast<int64_t>(targets.size() * 4), &rounded_)) return;
    start("cross_entropy", cross_entropy_rows, targets.size(), logits, staged, vocab,
          rounded_.f32());
    copy(nats, rounded_.data(), static_cast<int64_t>(targets.size() * 4));
  }
  std::optional<BadRow> bad_row() override {
    norms_ = 0;
    uint64_t first = BadRow::kNone;
    copy(&first, first_bad_.data(), sizeof first);
    if (first != BadRow::kNone) copy(first_bad_.data(), &BadRow::kNone, sizeof BadRow::kNone);
    return BadRow::of(first);
  }

 private:
  static constexpr int64_t kBlasWorkspace = 32 << 20;  // what cuBLAS recommends for Hopper

  /// y^T [n,rows] = w [n,k] x^T in cuBLAS' column-major words: both operands have k innermost.
  struct Product {
    cublasLtMatmulDesc_t operation = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, y = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
  };

  static Status blas_status(cublasStatus_t result, const char* what) {
    if (result == CUBLAS_STATUS_SUCCESS) return {};
    return error(StatusCode::kInternal, what, ": cuBLASLt error ", static_cast<int>(result));
  }

  Status find_product(int64_t n, int64_t rows, int64_t k, const Product** out) {
    const auto [entry, is_new] = products_.try_emplace({n, rows, k});
    Product& product = entry->second;
    *out = &product;
    if (!is_new) return {};
    const Status status = make_product(n, rows, k, &product);
    if (!status) {
      destroy(product);
      products_.erase(entry);
    }
    return status;
  }

  Status make_product(int64_t n, int64_t rows, int64_t k, Product* p) {
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
    const uint64_t limit = kBlasWorkspace;
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

  BadRows next_norm() { return {static_cast<unsigned long long*>(first_bad_.data()), norms_++}; }

  /// Remembers the first error.
  bool keep(Status status) {
    if (status_ && !status) (void)(status_ = std::move(status));
    return status_.ok();
  }

  bool reserve(int64_t bytes, Buffer* buffer) {
    if (buffer->bytes() >= bytes) return true;
    if (!keep(wait())) return false;  // the old memory may be in use
    return keep(Buffer::create(*this, bytes, buffer));
  }

  /// Host values in device memory, until the next call; null after an error.
  template <class T>
  const T* stage(std::span<const T> values) {
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    if (!reserve(bytes, &staged_)) return nullptr;
    copy(staged_.data(), values.data(), bytes);
    return static_cast<const T*>(staged_.data());
  }

  template <class Kernel, class Rows, class... Arguments>
  void start(const char* name, Kernel kernel, Rows rows, Arguments... arguments) {
    keep(cuda::launch(name, kernel, {.grid = static_cast<unsigned>(rows), .block = kThreads},
                      stream_, arguments...));
  }

  DType dtype_;
  int device_ = 0;
  cudaStream_t stream_ = nullptr;
  CublasLt blas_;
  cublasLtHandle_t handle_ = nullptr;
  std::map<std::array<int64_t, 3>, Product> products_;  // by n, rows, k
  Buffer blas_workspace_;
  Buffer first_bad_;   // the key of a BadRow
  int64_t norms_ = 0;  // since bad_row()
  Buffer staged_;      // ids and rows from the host
  Buffer rounded_;     // x in dtype_; results on their way to the host
  Status status_;
};

}  // namespace

Status make_cuda_compute(DType dtype, std::unique_ptr<Compute>* out) {
  auto compute = std::make_unique<CudaCompute>(dtype);
  MSA_TRY(compute->create());
  *out = std::move(compute);
  return {};
}

}  // namespace msa::model
