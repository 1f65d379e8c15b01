#include "cta.h"

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <thread>

// Saves this stack pointer in *save and goes on where `to` was saved.
extern "C" void emulator_switch(void** save, void* to);
#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif
asm(R"(
.globl emulator_switch
emulator_switch:
  push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
  ret
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 * 1024 + 320;  // neighbours in other sets of the caches
constexpr int64_t kMostIdleRounds = 10'000;      // warps miss a quarter of their turns, copies more

void poison(unsigned char* memory, size_t bytes) {
  constexpr uint32_t kNaN = 0x7fc17fc1;  // as f32, and twice as bf16
  for (size_t i = 0; i + 4 <= bytes; i += 4) std::memcpy(memory + i, &kNaN, 4);
}

}  // namespace

constinit thread_local Cta* cta = nullptr;
constinit thread_local unsigned char dynamic_shared[kMostSharedBytes] = {};

void fail(const char* what) {
  std::fprintf(stderr, "emulator: %s\n", what);
  std::fflush(nullptr);
  std::_Exit(1);
}

uint32_t shared_offset(const void* pointer) {
  const auto offset = static_cast<const unsigned char*>(pointer) - dynamic_shared;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kMostSharedBytes))
    fail("an address is not in shared memory");
  return static_cast<uint32_t>(offset);
}
unsigned char* shared_pointer(uint32_t offset) { return dynamic_shared + offset; }

/// Where a fiber begins.
void enter_fiber() {
  (*cta->kernel_)();
  cta->current->done = true;
  --cta->live_;
  cta->progress();
  cta->yield();
}

Cta::Cta(Cluster& cluster_, dim3 grid_, dim3 block_index_, unsigned threads, size_t shared_bytes,
         uint64_t seed)
    : cluster(cluster_),
      grid(grid_),
      block_index(block_index_),
      rng(seed),
      fibers_(threads),
      warps_(threads / 32),
      stacks_(new char[threads * kStackBytes]),
      shared_bytes_(shared_bytes),
      live_(threads) {
  for (unsigned i = 0; i < threads; ++i) {
    fibers_[i].index = dim3(i, 0, 0);
    fibers_[i].warp = &warps_[i / 32];
    fibers_[i].products.resize(1);
    start(fibers_[i], stacks_.get() + i * kStackBytes);
  }
}

/// The first switch to the fiber pops six registers and returns into enter_fiber().
void Cta::start(Fiber& fiber, char* stack) {
  const uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{15};
  auto** at = reinterpret_cast<void**>(top);
  *--at = nullptr;  // keeps the alignment that a call would leave
  *--at = reinterpret_cast<void*>(&enter_fiber);
  for (int i = 0; i < 6; ++i) *--at = nullptr;
  fiber.stack_pointer = at;
}

void Cta::turn(Fiber& fiber) {
  if (fiber.done || (fiber.ready != nullptr && !fiber.ready(fiber.waits_for))) return;
  fiber.ready = nullptr;
  current = &fiber;
  emulator_switch(&scheduler_, fiber.stack_pointer);
}

void Cta::yield() { emulator_switch(&current->stack_pointer, scheduler_); }

void Cta::run(const std::function<void()>& kernel) {
  if (rank() > 0) turn_.acquire();
  kernel_ = &kernel;
  cta = this;
  poison(dynamic_shared, shared_bytes_);
  std::vector<size_t> order(warps_.size());
  std::iota(order.begin(), order.end(), 0);
  for (int64_t round = 0; live_ > 0; ++round) {
    if (round % 64 == 0) rng.shuffle(order);
    for (const size_t warp : order) {
      if (rng.chance(25)) continue;
      for (size_t lane = 0; lane < 32; ++lane) turn(fibers_[warp * 32 + lane]);
    }
    if (!copies.empty() && rng.chance(33)) {
      const auto last = static_cast<int64_t>(copies.size()) - 1;
      std::swap(copies[static_cast<size_t>(rng.between(0, last))], copies.back());
      copies.back()();
      copies.pop_back();
    }
    if (++cluster.idle_rounds > kMostIdleRounds * static_cast<int64_t>(cluster.ctas.size()))
      fail("deadlock: every thread waits");
    // Seldom while there is something to do: it costs two switches of the host's threads.
    if (live_ > 0 && (cluster.idle_rounds > 1 || rng.chance(2))) pass_turn();
  }
  if (!copies.empty()) fail("a CTA ends while copies are on their way");
  cta = nullptr;
  pass_turn();
}

/// Lets the next CTA of the cluster run; one that has not ended waits for its turn to come again.
void Cta::pass_turn() {
  const size_t count = cluster.ctas.size();
  size_t next = (rank() + 1) % count;
  while (next != rank() && cluster.ctas[next]->live_ == 0) next = (next + 1) % count;
  if (next == rank()) return;
  cluster.ctas[next]->turn_.release();
  if (live_ > 0) turn_.acquire();
}

void Cta::arrive_at_cluster() {
  if (++cluster.arrived < cluster.ctas.size() * threads()) return;
  cluster.arrived = 0;
  ++cluster.meetings;
  progress();
}
void Cta::wait_for_cluster() {
  const uint64_t meeting = ++current->meetings;
  wait_until([&] { return cluster.meetings >= meeting; });
}

void Cta::send(uint32_t to, std::function<void()> arrive) {
  if (cluster.ctas.size() == 1) fail("a store to a CTA in a kernel without clusters");
  if (to >= cluster.ctas.size()) fail("a store to a CTA that is not of the cluster");
  if (cluster.ctas[to]->live_ == 0) fail("a store to a CTA that has ended");
  cluster.ctas[to]->copies.push_back(std::move(arrive));
}

const Words* Cta::exchange(const Words& own) {
  Warp& warp = *current->warp;
  const uint64_t generation = warp.generation;
  Words* const words = warp.words[generation % 2];
  words[current->lane()] = own;
  if (++warp.arrived == 32) {
    warp.arrived = 0;
    ++warp.generation;
    progress();
  }
  wait_until([&] { return warp.generation != generation; });
  return words;
}

bool Cta::join(uint32_t barrier, uint32_t threads, bool vote) {
  return join(barriers_[barrier], threads, vote);
}

void Cta::join_lanes(uint32_t lanes) {
  join(current->warp->some[lanes], static_cast<uint32_t>(__builtin_popcount(lanes)));
}

bool Cta::join(NamedBarrier& b, uint32_t threads, bool vote) {
  const uint64_t generation = b.generation;
  b.votes[generation % 2] |= vote;
  if (++b.arrived == threads) {
    b.arrived = 0;
    ++b.generation;
    b.votes[b.generation % 2] = false;
    progress();
  }
  wait_until([&] { return b.generation != generation; });
  return b.votes[generation % 2];
}

void Cluster::run(const std::function<void()>& kernel) {
  std::vector<std::thread> others;
  for (size_t rank = 1; rank < ctas.size(); ++rank)
    others.emplace_back([&, rank] { ctas[rank]->run(kernel); });
  ctas[0]->run(kernel);
  for (std::thread& other : others) other.join();
}

void run_grid(dim3 grid, unsigned cluster_ctas, unsigned threads, size_t shared_bytes,
              const std::function<void()>& kernel) {
  static std::atomic<uint64_t> launches{0};
  const uint64_t launch = ++launches;
  std::atomic<unsigned> next{0};
  const auto serve = [&] {
    const unsigned ctas = grid.x * grid.y * grid.z;
    for (unsigned first = cluster_ctas * next++; first < ctas; first = cluster_ctas * next++) {
      Cluster cluster;
      for (unsigned i = first; i < first + cluster_ctas; ++i) {
        const uint64_t seed = launch << 32 | i;
        const dim3 index(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y);
        cluster.ctas.push_back(
            std::make_unique<Cta>(cluster, grid, index, threads, shared_bytes, seed));
      }
      cluster.run(kernel);
    }
  };
  std::vector<std::thread> sms;
  for (int i = 0; i < kSMs; ++i) sms.emplace_back(serve);
  for (std::thread& sm : sms) sm.join();
}

}  // namespace emulator
