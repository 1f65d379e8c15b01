#include "runtime.h"

#include <pthread.h>

#include <array>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "core/text.h"

namespace msa::python {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kIdleLanes = 4;         // lanes kept when no call uses them
constexpr size_t kIdleBytes = 64 << 20;  // scratch memory that an idle lane may keep
constexpr size_t kCachedPlans = 1024;

/// Everything a plan depends on, as one ordered value.
using Key = std::pair<std::array<int64_t, 18>, std::string>;

Key key_of(const Problem& p, const Limits& l, const std::string& backend) {
  return {{static_cast<int64_t>(p.op), static_cast<int64_t>(p.dtype),
           static_cast<int64_t>(p.layout), p.heads_q, p.heads_kv, p.head_dim, p.index_dim,
           p.block_size, p.topk, p.init_blocks, p.local_blocks, static_cast<int64_t>(p.device.kind),
           p.device.id, l.max_batch, l.max_tokens, l.max_seqlen_q, l.max_seqlen_k, l.max_threads},
          backend};
}

struct Shared {
  std::mutex mutex;
  std::vector<Lane*> idle;
  std::map<Key, Plan> plans;
  int32_t threads = 0;  // 0: not yet decided
};

/// Never destroyed: a daemon thread may still be in a call when the process ends.
Shared& shared() {
  static Shared& instance = *[] {
    auto* made = new Shared;
    // A child of fork() has none of the teams' threads: it forgets the teams and makes new ones.
    pthread_atfork([] { shared().mutex.lock(); }, [] { shared().mutex.unlock(); },
                   [] {
                     shared().idle.clear();
                     shared().mutex.unlock();
                   });
    return made;
  }();
  return instance;
}

Status threads_from_environment(int32_t* count) {
  const char* given = std::getenv("MSA_THREADS");
  if (given == nullptr || *given == '\0') {
    *count = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
    return {};
  }
  const char* end = given + std::strlen(given);
  const auto [stop, code] = std::from_chars(given, end, *count);
  if (code != std::errc() || stop != end || *count < 1)
    return invalid("MSA_THREADS: got \"", given, "\", expected a number of threads >= 1");
  return {};
}

}  // namespace

Status num_threads(int32_t* count) {
  const std::lock_guard lock(shared().mutex);
  if (shared().threads == 0) MSA_TRY(threads_from_environment(&shared().threads));
  *count = shared().threads;
  return {};
}

void set_num_threads(int32_t count) {
  std::vector<Lane*> dropped;
  {
    const std::lock_guard lock(shared().mutex);
    shared().threads = count;
    dropped.swap(shared().idle);
  }
  for (Lane* lane : dropped) delete lane;
}

Status cached_plan(const Problem& problem, const Limits& limits, const std::string& backend,
                   Plan* out) {
  std::string name = backend;
  if (const char* forced = std::getenv("MSA_BACKEND"); backend == "auto" && forced != nullptr)
    name = std::string("auto ") + forced;  // the same request under another environment
  const Key key = key_of(problem, limits, name);
  {
    const std::lock_guard lock(shared().mutex);
    if (const auto found = shared().plans.find(key); found != shared().plans.end()) {
      *out = found->second;
      return {};
    }
  }
  MSA_TRY(msa::plan(problem, limits, out, backend));
  const std::lock_guard lock(shared().mutex);
  if (shared().plans.size() >= kCachedPlans) shared().plans.clear();
  shared().plans.emplace(key, *out);
  return {};
}

void* Lane::memory(size_t bytes) {
  if (bytes > capacity) {
    release_memory();
    data = ::operator new(bytes, std::align_val_t{kAlignment});
    capacity = bytes;
  }
  return data;
}

void Lane::release_memory() {
  ::operator delete(data, std::align_val_t{kAlignment});
  data = nullptr;
  capacity = 0;
}

LanePtr take_lane(int threads) {
  {
    const std::lock_guard lock(shared().mutex);
    std::vector<Lane*>& idle = shared().idle;
    for (size_t i = idle.size(); i-- > 0;) {
      if (idle[i]->team.count() != threads) continue;
      LanePtr lane(idle[i]);
      idle.erase(idle.begin() + static_cast<ptrdiff_t>(i));
      return lane;
    }
  }
  return LanePtr(new Lane(threads));
}

void GiveBack::operator()(Lane* lane) const {
  if (lane->capacity > kIdleBytes) lane->release_memory();
  Lane* dropped = lane;
  {
    const std::lock_guard lock(shared().mutex);
    std::vector<Lane*>& idle = shared().idle;
    idle.push_back(lane);
    dropped = nullptr;
    if (idle.size() > kIdleLanes) {  // the one that waited longest
      dropped = idle.front();
      idle.erase(idle.begin());
    }
  }
  delete dropped;
}

}  // namespace msa::python
