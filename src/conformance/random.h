// Random numbers that are the same with every standard library.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

namespace msa::conformance {

/// splitmix64: tiny, and good enough to make test data.
class Rng {
 public:
  explicit Rng(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  /// In [low, high], both included.
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return between(1, 100) <= percent; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[between(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  /// Nearly normal, mean 0 and variance 1: a sum of four uniform numbers.
  float normal() {
    const uint64_t b = bits();
    const auto part = [b](int i) { return static_cast<float>((b >> (16 * i)) & 0xffffu); };
    return (part(0) + part(1) + part(2) + part(3) - 2 * 65535.0f) * 2.6430e-5f;
  }
  template <class T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i)
      std::swap(items[i - 1], items[static_cast<size_t>(between(0, static_cast<int64_t>(i) - 1))]);
  }

 private:
  uint64_t state_;
};

}  // namespace msa::conformance
