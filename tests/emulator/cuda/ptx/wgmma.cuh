// Stand-in for src/cuda/ptx/wgmma.cuh, whose comment has the layouts. A thread computes its own two
// rows of D: A comes from the registers of its warp at once, or like B from shared memory when the
// instruction executes.
#pragma once

#include <functional>
#include <utility>

#include "core/half.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/mma.cuh"

namespace msa::cuda::ptx {

enum class BLayout { kKMajor = 0, kNMajor = 1 };
enum class ALayout { kKMajor = 0, kMMajor = 1 };

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

/// A matrix in shared memory by its descriptor: byte offsets (PTX ISA, "matrix descriptor format").
class SharedMatrix {
 public:
  explicit SharedMatrix(uint64_t descriptor)
      : start_(bytes(descriptor)),
        leading_(bytes(descriptor >> 16)),
        stride_(bytes(descriptor >> 32)) {
    if (descriptor >> 62 != 1) emulator::fail("a matrix descriptor without the 128-byte swizzle");
  }
  /// Rows of 128 bytes in groups of 8; panels of 64 columns.
  float at(int row, int column) const {
    const uint32_t address = start_ + static_cast<uint32_t>(column / 64) * leading_ +
                             static_cast<uint32_t>(row / 8) * stride_ +
                             static_cast<uint32_t>(row % 8 * 128 + column % 64 * 2);
    uint16_t element;
    std::memcpy(&element, emulator::shared_pointer(swizzled(address)), sizeof(element));
    return bf16_to_f32(element);
  }

 private:
  static uint32_t bytes(uint64_t field) { return static_cast<uint32_t>(field & 0x3fff) << 4; }

  uint32_t start_, leading_, stride_;
};

/// d (+)= rows * B of one k16 step. A row of B in memory is one n with k along it, or one k.
template <BLayout kB, int kCount>
void multiply(float (&d)[kCount], const ARows& rows, const SharedMatrix& b, bool accumulate) {
  const int first = 2 * (emulator::cta->current->lane() % 4);
  for (int i = 0; i < kCount / 2; ++i) {  // 2 * j + e
    const int n = 8 * (i / 2) + first + i % 2;
    float sum[2] = {};
    for (int k = 0; k < 16; ++k) {
      const float x = kB == BLayout::kKMajor ? b.at(n, k) : b.at(k, n);
      for (int h = 0; h < 2; ++h) sum[h] += rows.at[h][k] * x;
    }
    for (int h = 0; h < 2; ++h) {
      float& to = d[4 * (i / 2) + 2 * h + i % 2];
      to = (accumulate ? to : 0) + sum[h];
    }
  }
}

/// A from registers.
template <BLayout kB = BLayout::kKMajor, int kCount>
void wgmma(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  emulator::cta->current->products.back().push_back(
      [&d, rows = rows_of_warp(a), b = SharedMatrix(b), accumulate] {
        multiply<kB>(d, rows, b, accumulate);
      });
}

/// A from shared memory: a row of it in memory is one row with k along it, or one k.
template <BLayout kB = BLayout::kKMajor, ALayout kA = ALayout::kKMajor, int kCount>
void wgmma(float (&d)[kCount], uint64_t a, uint64_t b, bool accumulate) {
  const int lane = emulator::cta->current->lane();
  const int warp = static_cast<int>(emulator::cta->current->index.x) / 32 % 4;
  emulator::cta->current->products.back().push_back(
      [&d, first = 16 * warp + lane / 4, a = SharedMatrix(a), b = SharedMatrix(b), accumulate] {
        ARows rows;
        for (int h = 0; h < 2; ++h)
          for (int k = 0; k < 16; ++k)
            rows.at[h][k] =
                kA == ALayout::kKMajor ? a.at(first + 8 * h, k) : a.at(k, first + 8 * h);
        multiply<kB>(d, rows, b, accumulate);
      });
}

}  // namespace msa::cuda::ptx
