// The thread team behind every parallel loop: one atomic counter hands out tasks. Workers sleep
// between loops, but not at once: the loops of one operator follow each other within microseconds.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#include "msa/backend.h"

namespace msa {
namespace {

/// Returns once `value` is no longer `old`; sleeps after some 20 microseconds.
template <class T>
void await_change(const std::atomic<T>& value, T old) {
  for (int spin = 0; spin < 500; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

struct Threads::Team {
  std::vector<std::thread> workers;
  std::atomic<uint32_t> generation{0};  // counts loops; a change wakes the workers
  std::atomic<int> active{0};           // workers still inside the current loop
  bool stopping = false;                // published by generation, like the loop itself:

  Task task = nullptr;
  const void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};

  void work(int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      task(context, i, worker);
  }

  void begin() {
    next.store(0, std::memory_order_relaxed);
    active.store(static_cast<int>(workers.size()), std::memory_order_relaxed);
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
  }

  void finish() {
    for (int left; (left = active.load(std::memory_order_acquire)) != 0;)
      await_change(active, left);
  }

  void serve(int worker) {
    for (uint32_t seen = 0;; ++seen) {
      await_change(generation, seen);
      if (stopping) return;
      work(worker);
      if (active.fetch_sub(1, std::memory_order_acq_rel) == 1) active.notify_one();
    }
  }
};

Threads::Threads(int count) : team_(std::make_unique<Team>()) {
  if (count <= 0) count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  team_->workers.reserve(static_cast<size_t>(count - 1));
  for (int worker = 1; worker < count; ++worker) {
    try {
      team_->workers.emplace_back([team = team_.get(), worker] { team->serve(worker); });
    } catch (const std::system_error&) {
      break;  // the system has no more threads for us: a smaller team computes the same
    }
  }
}

Threads::~Threads() {
  team_->stopping = true;
  team_->begin();
  for (std::thread& worker : team_->workers) worker.join();
}

int Threads::count() const { return static_cast<int>(team_->workers.size()) + 1; }

void Threads::run(int64_t tasks, Task task, const void* context) {
  Team& team = *team_;
  if (tasks <= 1 || team.workers.empty()) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  team.task = task;
  team.context = context;
  team.tasks = tasks;
  team.begin();
  team.work(0);
  team.finish();
}

}  // namespace msa
