// How a workspace is divided. No CUDA.
#pragma once

#include <cstdint>

namespace msa::cuda {

/// Hands out stretches of a workspace: their first bytes, at multiples of 256.
class Placement {
 public:
  explicit constexpr Placement(int64_t begin = 0) : end_(begin) {}
  constexpr int64_t place(int64_t bytes) {
    const int64_t begin = end_;
    end_ += (bytes + 255) / 256 * 256;
    return begin;
  }
  constexpr int64_t end() const { return end_; }

 private:
  int64_t end_;
};

}  // namespace msa::cuda
