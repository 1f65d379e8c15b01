// Stand-in for src/cuda/ptx/wgmma.cuh, whose comment has the layouts. A thread computes its own two
// rows of D: A comes from the registers of its warp at once, B from shared memory when the
// instruction executes.
#pragma once

#include <functional>
#include <utility>

#include "core/half.h"
#include "cuda/ptx/copy.cuh"

namespace msa::cuda::ptx {

enum class BLayout { kKMajor = 0, kNMajor = 1 };

inline void wgmma_fence() {}

/// Executes all groups but the last `pending` committed ones; the open one stays.
inline void execute_products(size_t pending) {
  auto& groups = emulator::cta->current->products;
  while (groups.size() > pending + 1) {
    for (const auto& product : groups.front()) product();
    groups.erase(groups.begin());
  }
}
inline void wgmma_commit() {
  emulator::cta->current->products.emplace_back();
  if (emulator::cta->rng.chance(50)) execute_products(0);
}
template <int kPending>
void wgmma_wait() {
  // One wait in eight is long enough for copies to overwrite what was released too early.
  constexpr int kRounds = 60;
  const bool is_long = __shfl_sync(0xffffffff, emulator::cta->rng.between(0, 7), 0) == 0;
  for (int i = 0; is_long && i < kRounds; ++i) emulator::cta->yield();
  execute_products(kPending);
  __syncwarp();
}
template <int kCount>
void pin(float (&)[kCount]) {}

/// Two rows of a k16 step of A.
struct ARows {
  float at[2][16];
};
inline ARows rows_of_warp(const uint32_t (&a)[4]) {
  const emulator::Words* words = emulator::cta->exchange({a[0], a[1], a[2], a[3]});
  const int quad = emulator::cta->current->lane() / 4 * 4;
  ARows rows;
  for (int h = 0; h < 2; ++h) {
    for (int k = 0; k < 16; ++k) {
      const auto pair = static_cast<uint32_t>(words[quad + k % 8 / 2][k / 8 * 2 + h]);
      rows.at[h][k] = bf16_to_f32(static_cast<uint16_t>(pair >> k % 2 * 16));
    }
  }
  return rows;
}

/// A matrix descriptor of B: byte offsets (PTX ISA, "matrix descriptor format").
template <BLayout kB>
struct BMatrix {
  uint32_t start, leading, stride;
  explicit BMatrix(uint64_t descriptor)
      : start(bytes(descriptor)),
        leading(bytes(descriptor >> 16)),
        stride(bytes(descriptor >> 32)) {
    if (descriptor >> 62 != 1) emulator::fail("a matrix descriptor without the 128-byte swizzle");
  }
  /// Rows of 128 bytes in groups of 8: n (keys) with k along them, or k with 64 n along them.
  float at(int k, int n) const {
    const int row = kB == BLayout::kKMajor ? n : k, column = kB == BLayout::kKMajor ? k : n;
    const uint32_t address = start + static_cast<uint32_t>(column / 64) * leading +
                             static_cast<uint32_t>(row / 8) * stride +
                             static_cast<uint32_t>(row % 8 * 128 + column % 64 * 2);
    uint16_t element;
    std::memcpy(&element, emulator::shared_pointer(swizzled(address)), sizeof(element));
    return bf16_to_f32(element);
  }

 private:
  static uint32_t bytes(uint64_t field) { return static_cast<uint32_t>(field & 0x3fff) << 4; }
};

template <BLayout kB = BLayout::kKMajor, int kCount>
void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  const auto product = [&d, rows = rows_of_warp(a), matrix = BMatrix<kB>(b), accumulate,
                        first = 2 * (emulator::cta->current->lane() % 4)] {
    for (int i = 0; i < kCount / 2; ++i) {  // 2 * j + e
      const int n = 8 * (i / 2) + first + i % 2;
      float sum[2] = {};
      for (int k = 0; k < 16; ++k) {
        const float x = matrix.at(k, n);
        for (int h = 0; h < 2; ++h) sum[h] += rows.at[h][k] * x;
      }
      for (int h = 0; h < 2; ++h) {
        float& to = d[4 * (i / 2) + 2 * h + i % 2];
        to = (accumulate ? to : 0) + sum[h];
      }
    }
  };
  emulator::cta->current->products.back().push_back(product);
}

}  // namespace msa::cuda::ptx
