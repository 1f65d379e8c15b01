// The thread team behind every parallel loop: one atomic counter hands out tasks, workers sleep
// between loops.
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "msa/backend.h"

namespace msa {

struct Threads::Team {
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable start, finished;
  uint64_t generation = 0;  // counts loops; a change wakes the workers
  int active = 0;           // workers still inside the current loop
  bool stopping = false;

  Task task = nullptr;
  const void* context = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};

  void work(int worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
      task(context, i, worker);
  }

  void sleep_and_work(int worker) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock lock(mutex);
        start.wait(lock, [&] { return stopping || generation != seen; });
        if (stopping) return;
        seen = generation;
      }
      work(worker);
      std::unique_lock lock(mutex);
      if (--active == 0) finished.notify_one();
    }
  }
};

Threads::Threads(int count) : team_(std::make_unique<Team>()) {
  if (count <= 0) count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  for (int worker = 1; worker < count; ++worker) {
    team_->workers.emplace_back([team = team_.get(), worker] { team->sleep_and_work(worker); });
  }
}

Threads::~Threads() {
  {
    std::unique_lock lock(team_->mutex);
    team_->stopping = true;
  }
  team_->start.notify_all();
  for (std::thread& worker : team_->workers) worker.join();
}

int Threads::count() const { return static_cast<int>(team_->workers.size()) + 1; }

void Threads::run(int64_t tasks, Task task, const void* context) {
  Team& team = *team_;
  if (tasks <= 1 || team.workers.empty()) {
    for (int64_t i = 0; i < tasks; ++i) task(context, i, 0);
    return;
  }
  {
    std::unique_lock lock(team.mutex);
    team.task = task;
    team.context = context;
    team.tasks = tasks;
    team.next.store(0, std::memory_order_relaxed);
    team.active = static_cast<int>(team.workers.size());
    ++team.generation;
  }
  team.start.notify_all();
  team.work(0);
  std::unique_lock lock(team.mutex);
  team.finished.wait(lock, [&] { return team.active == 0; });
}

}  // namespace msa
