// CUDA kernels on the CPU, without a GPU and without nvcc.
//
// The sources of the families of src/cuda are compiled as C++, as they are. This folder comes ahead
// of src in the include path and replaces what only a GPU has: the CUDA headers and cuda/ptx, whose
// functions have the names and the contracts of the real ones. cuda/sm90/sizes.h makes calls short.
//
// What is emulated
//   - threads, as fibers, and warps, whose collectives wait for all 32 lanes; CTAs one per SM at
//     once, each SM a thread of the host. Warps advance at random.
//   - clusters of up to 16 CTAs, one at a time per SM, with their barrier and with st.async.
//   - mbarriers (arrivals, bytes, phases) and named barriers; a CTA that cannot go on is reported.
//   - TMA: boxes, to and fro, with their zeros outside the tensor and the 128-byte swizzle, and
//     plain stretches of bytes. They, and what other CTAs send, arrive late and in any order.
//   - ldmatrix, mma, and wgmma of every width with their register layouts and matrix descriptors, A
//     from registers or shared memory. A wgmma executes when it is committed or, perhaps long
//     after, when it is waited for.
//   - shared memory that holds NaN at first.
// What is not
//   - time, and everything that only costs time: bank conflicts, registers, caches;
//   - memory ordering: every access is seen at once, so no missing fence and no missing
//     wait_for_previous_grid() is found (grids run one after another);
//   - the limits of instructions beyond alignment, and their rounding: sums are plain f32, exp2 is
//     the C library's;
//   - registers that are written while a wgmma still reads them: A from registers is taken at once;
//   - what other kernels use: loads into several CTAs at once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <semaphore>
#include <vector>

#include "conformance/random.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

inline constexpr int kSMs = 3;
inline constexpr size_t kMostSharedBytes = 227 * 1024;  ///< dynamic, of a CTA on Hopper
inline constexpr unsigned kMostClusterCtas = 16;

/// Ends the program: the kernel did what hardware answers with a hang, a trap or chaos.
[[noreturn]] void fail(const char* what);

/// What a lane gives to a collective of its warp.
using Words = std::array<uint64_t, 4>;

struct NamedBarrier {
  uint32_t arrived = 0;
  uint64_t generation = 0;
  bool votes[2] = {};  ///< any of this generation, and of the one before
};

struct Warp {
  int arrived = 0;
  uint64_t generation = 0;                ///< of collectives
  Words words[2][32];                     ///< of this generation and the one before
  std::map<uint32_t, NamedBarrier> some;  ///< of collectives of some lanes, by their mask
};

/// A thread of a CTA.
struct Fiber {
  void* stack_pointer = nullptr;
  dim3 index;
  Warp* warp = nullptr;
  bool (*ready)(const void*) = nullptr;  ///< whether it can go on, of `waits_for`; null: it can
  const void* waits_for = nullptr;
  bool done = false;
  uint64_t meetings = 0;  ///< of the cluster that it has waited for
  int stores = 0;         ///< boxes of this thread on their way to device memory
  std::vector<std::vector<std::function<void()>>> products;  ///< wgmma: groups, the open one last
  int lane() const { return static_cast<int>(index.x % 32); }
};

struct Cta;

/// CTAs that run at the same time. Each is a thread of the host, since each has shared memory of
/// its own, but they take turns, so that what happens depends on their seeds alone.
struct Cluster {
  void run(const std::function<void()>& kernel);

  std::vector<std::unique_ptr<Cta>> ctas;  ///< by rank
  uint64_t arrived = 0, meetings = 0;      ///< at the cluster's barrier
  int64_t idle_rounds = 0;                 ///< in which nobody made progress
};

/// A CTA while it runs.
struct Cta {
  using Rng = msa::conformance::Rng;

  Cta(Cluster& cluster, dim3 grid, dim3 block_index, unsigned threads, size_t shared_bytes,
      uint64_t seed);
  void run(const std::function<void()>& kernel);

  /// Back to the scheduler, until this fiber's next turn.
  void yield();
  /// Back to the scheduler, which asks ready() at this fiber's turns.
  template <class Ready>
  void wait_until(const Ready& ready) {
    if (ready()) return;
    current->ready = [](const void* self) { return (*static_cast<const Ready*>(self))(); };
    current->waits_for = &ready;
    yield();
  }
  /// Whether any of the threads voted.
  bool join(uint32_t barrier, uint32_t threads, bool vote = false);
  /// Joins those lanes of the warp.
  void join_lanes(uint32_t lanes);
  uint32_t threads() const { return static_cast<uint32_t>(fibers_.size()); }
  /// A collective: every lane's words, once all have come.
  const Words* exchange(const Words& own);
  /// Something happened that others may have waited for.
  void progress() { cluster.idle_rounds = 0; }

  void arrive_at_cluster();
  void wait_for_cluster();
  /// `arrive` will happen in the CTA of that rank.
  void send(uint32_t rank, std::function<void()> arrive);
  uint32_t rank() const { return block_index.x % static_cast<uint32_t>(cluster.ctas.size()); }

  Cluster& cluster;
  dim3 grid, block_index;
  Fiber* current = nullptr;
  Rng rng;
  std::vector<std::function<void()>> copies;  ///< by TMA or from other CTAs, on their way

 private:
  void start(Fiber& fiber, char* stack);
  bool join(NamedBarrier& barrier, uint32_t threads, bool vote = false);
  void turn(Fiber& fiber);
  void pass_turn();

  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::array<NamedBarrier, 16> barriers_{};
  std::unique_ptr<char[]> stacks_;
  const std::function<void()>* kernel_ = nullptr;
  void* scheduler_ = nullptr;  ///< its stack pointer
  size_t shared_bytes_;
  unsigned live_;  ///< threads
  std::binary_semaphore turn_{0};

  friend void enter_fiber();
};

/// The CTA that this thread of the host runs.
extern constinit thread_local Cta* cta;

/// That CTA's dynamic shared memory.
alignas(1024) extern constinit thread_local unsigned char dynamic_shared[kMostSharedBytes];

/// Offset of a pointer into dynamic shared memory, and the reverse.
uint32_t shared_offset(const void* pointer);
unsigned char* shared_pointer(uint32_t offset);

/// Runs the kernel in every thread of every CTA; returns when all are done. Clusters lie along x.
void run_grid(dim3 grid, unsigned cluster_ctas, unsigned threads, size_t shared_bytes,
              const std::function<void()>& kernel);

template <class T>
uint64_t to_word(T value) {
  uint64_t word = 0;
  std::memcpy(&word, &value, sizeof(T));
  return word;
}
template <class T>
T from_word(uint64_t word) {
  T value;
  std::memcpy(&value, &word, sizeof(T));
  return value;
}

}  // namespace emulator
