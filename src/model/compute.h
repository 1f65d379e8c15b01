// Everything of a model outside attention, as a dozen functions of a device: the layers are written
// on these and on the public operators, so that another device needs no new layers.
//
// Activations are f32, row-major and contiguous: x [rows,dim]. Pointers are device memory of the
// Compute unless marked "host"; host memory may be reused when a function returns. A function
// returns when its work is enqueued (on the CPU: done); work runs in the order it was enqueued.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "msa/backend.h"
#include "msa/tensor.h"

namespace msa::model {

/// A weight matrix [n,k] in the form the device multiplies by.
class Matrix {
 public:
  virtual ~Matrix() = default;
  virtual int64_t rows() const = 0;     ///< n, outputs
  virtual int64_t columns() const = 0;  ///< k, inputs
};

class Compute;

/// Device memory of a Compute, as an owner. Uninitialised.
class Buffer {
 public:
  /// Errors: kUnavailable with the size that is not there.
  static Status create(Compute& compute, int64_t bytes, Buffer* out);
  /// A copy of host values.
  static Status create(Compute& compute, std::span<const float> values, Buffer* out);

  void* data() const { return data_.get(); }
  float* f32() const { return static_cast<float*>(data_.get()); }
  int64_t bytes() const { return bytes_; }

 private:
  struct Release {
    Compute* compute;
    void operator()(void* data) const;
  };
  std::unique_ptr<void, Release> data_;
  int64_t bytes_ = 0;
};

/// RMS norm in Gemma's form: fp32, times (1 + weight).
struct Norm {
  Buffer weight;  ///< f32 [dim]
  int64_t dim = 0;
  float eps = 0;
};

/// A row whose mean square is no finite number, in a norm.
struct BadRow {
  int64_t row;
  int64_t call;  ///< of add_norm or norm_rope, counted from 0

  /// Lower rows have lower keys, and in a row earlier calls.
  static constexpr uint64_t key(int64_t row, int64_t call) {
    return static_cast<uint64_t>(row) << 32 | static_cast<uint64_t>(call);
  }
  static constexpr uint64_t kNone = ~uint64_t{0};
  static std::optional<BadRow> of(uint64_t key) {
    if (key == kNone) return std::nullopt;
    return BadRow{static_cast<int64_t>(key >> 32), static_cast<int64_t>(key & 0xffffffff)};
  }
};

class Compute {
 public:
  virtual ~Compute() = default;

  virtual Device device() const = 0;  ///< of every pointer that is not marked "host"
  virtual Queue queue() = 0;          ///< for the public operators
  virtual int threads() const = 0;
  /// Rows that keep the device busy without making the activations large.
  virtual int64_t chunk_rows() const = 0;
  /// Returns when all enqueued work is done. Errors: kInternal, with what failed on the device.
  virtual Status wait() = 0;

  /// Uninitialised memory, 64-byte aligned (256 on CUDA), or null; freed with `release`.
  virtual void* allocate(int64_t bytes) = 0;
  virtual void release(void* data) = 0;
  /// Between host and device memory, either way; the destination is complete on return.
  virtual void copy(void* to, const void* from, int64_t bytes) = 0;
  /// Packs a host matrix w [n,k] of f32, bf16 or f16.
  virtual std::unique_ptr<Matrix> upload(const void* w, DType dtype, int64_t n, int64_t k) = 0;

  /// y [rows,n] = x [rows,k] w^T.
  virtual void matmul(const Matrix& w, const float* x, int64_t rows, float* y) = 0;
  /// y[i] = table[ids[i]]; ids (host) are inside the table.
  virtual void embed(const Buffer& table, std::span<const int32_t> ids, int64_t dim, float* y) = 0;
  /// x += delta (may be null), then y = norm(x). Notes rows without a finite mean square.
  virtual void add_norm(const Norm& norm, float* x, const float* delta, int64_t rows, float* y) = 0;
  /// turns [rows,rotary_dim]: cosines then sines of the angles of positions first..first+rows-1.
  virtual void rope_angles(int64_t first, int64_t rows, int32_t rotary_dim, double theta,
                           float* turns) = 0;
  /// y [rows,heads,D] (dtype) = each head of x normed, its first rotary_dim channels turned.
  /// Uses up x. Notes rows without a finite mean square.
  virtual void norm_rope(const Norm& norm, float* x, int64_t rows, int64_t heads,
                         const float* turns, int32_t rotary_dim, void* y, DType dtype) = 0;
  /// y (dtype) = x, count elements.
  virtual void convert(const float* x, int64_t count, void* y, DType dtype) = 0;
  /// y [rows,n] = (clamp(up) + 1) * g * sigmoid(alpha * g), g = min(gate, limit), of x [rows,2n]
  /// holding gate then up.
  virtual void swiglu(const float* x, int64_t rows, int64_t n, float alpha, float limit,
                      float* y) = 0;
  /// y[i] = x[rows[i]]; rows on the host.
  virtual void gather(const float* x, std::span<const int32_t> rows, int64_t dim, float* y) = 0;
  /// y[rows[i]] += scale * weights[i] * x[i]; rows are distinct; rows and weights on the host.
  virtual void scatter_add(const float* x, std::span<const int32_t> rows,
                           std::span<const float> weights, float scale, int64_t dim, float* y) = 0;
  /// nats[i] (host) = -ln softmax(logits[i])[targets[i]].
  virtual void cross_entropy(const float* logits, std::span<const int32_t> targets, int64_t vocab,
                             float* nats) = 0;
  /// The lowest row that the norms since the last question noted, and the first of these calls to
  /// note it. Forgets them.
  virtual std::optional<BadRow> bad_row() = 0;
};

/// The CPU, with a team of `threads` (0 = all of the machine's).
std::unique_ptr<Compute> make_cpu_compute(int threads);

/// The current CUDA device; matrix products round both operands to `dtype` (bf16, or f32: exact).
/// Errors: kUnavailable without a device, in a build without CUDA, or without cuBLASLt.
Status make_cuda_compute(DType dtype, std::unique_ptr<Compute>* out);

}  // namespace msa::model
