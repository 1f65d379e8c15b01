// Stand-in for src/cuda/ptx/copy.cuh.
#pragma once

#include <cuda.h>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

enum class CacheHint { kEvictNormal, kEvictFirst };

/// Where the byte at an address lies under the 128-byte swizzle: its 16-byte unit moves by the
/// number of its 128-byte row mod 8.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

/// Where the element at coordinates `at` lies, 16 bits; null outside the tensor.
inline auto place_of(const CUtensorMap& map, const int64_t (&at)[4]) {
  int64_t offset = 0;
  for (int i = 0; i < 4; ++i) {
    if (at[i] < 0 || at[i] >= map.extent[i]) return decltype(map.data + offset){};
    offset += at[i] * map.stride[i];
  }
  return map.data + offset;
}
/// It, or zero.
inline uint16_t element_of(const CUtensorMap& map, const int64_t (&at)[4]) {
  uint16_t element = 0;
  if (const auto* place = place_of(map, at)) std::memcpy(&element, place, sizeof(element));
  return element;
}

inline void load_box(void* to, const CUtensorMap* map, Barrier* barrier, int32_t c0, int32_t c1,
                     int32_t c2, int32_t c3, CacheHint = CacheHint::kEvictNormal) {
  const uint32_t begin = shared_address(to);
  if (begin % 1024 != 0) emulator::fail("a box does not begin at a swizzle atom");
  emulator::cta->copies.push_back([=, map = *map] {
    uint32_t address = begin;
    for (int64_t x3 = c3; x3 < c3 + map.box[3]; ++x3)
      for (int64_t x2 = c2; x2 < c2 + map.box[2]; ++x2)
        for (int64_t x1 = c1; x1 < c1 + map.box[1]; ++x1)
          for (int64_t x0 = c0; x0 < c0 + map.box[0]; ++x0, address += 2) {
            const uint16_t element = element_of(map, {x0, x1, x2, x3});
            std::memcpy(emulator::shared_pointer(swizzled(address)), &element, sizeof(element));
          }
    update(barrier, 0, -int64_t{address - begin});
  });
}

/// Executes perhaps long after, as a load does.
inline void store_box(const CUtensorMap* map, const void* from, int32_t c0, int32_t c1, int32_t c2,
                      int32_t c3) {
  const uint32_t begin = shared_address(from);
  if (begin % 1024 != 0) emulator::fail("a box does not begin at a swizzle atom");
  emulator::Fiber* fiber = emulator::cta->current;
  ++fiber->stores;
  emulator::cta->copies.push_back([=, map = *map] {
    uint32_t address = begin;
    for (int64_t x3 = c3; x3 < c3 + map.box[3]; ++x3)
      for (int64_t x2 = c2; x2 < c2 + map.box[2]; ++x2)
        for (int64_t x1 = c1; x1 < c1 + map.box[1]; ++x1)
          for (int64_t x0 = c0; x0 < c0 + map.box[0]; ++x0, address += 2)
            if (const auto* element = place_of(map, {x0, x1, x2, x3}))
              std::memcpy(const_cast<unsigned char*>(element),
                          emulator::shared_pointer(swizzled(address)), 2);
    --fiber->stores;
    emulator::cta->progress();
  });
}
inline void commit_stores() {}
inline void wait_stores() {
  emulator::cta->wait_until([fiber = emulator::cta->current] { return fiber->stores == 0; });
}

inline void prefetch_map(const CUtensorMap*) {}

inline void load_bytes(void* to, const void* from, uint32_t bytes, Barrier* barrier) {
  const uint32_t begin = shared_address(to);
  if (begin % 16 != 0 || reinterpret_cast<uintptr_t>(from) % 16 != 0 || bytes % 16 != 0)
    emulator::fail("a copy of bytes that are not 16-byte aligned");
  emulator::cta->copies.push_back([=] {
    std::memcpy(emulator::shared_pointer(begin), from, bytes);
    update(barrier, 0, -int64_t{bytes});
  });
}

}  // namespace msa::cuda::ptx
