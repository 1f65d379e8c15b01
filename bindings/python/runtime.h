// What calls share: thread teams, scratch memory and plans. Every function may be called from any
// thread, with or without the GIL, and in a child after fork().
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "msa/backend.h"

namespace msa::python {

/// Threads of implicit plans: what set_num_threads() said, else MSA_THREADS, else all of the
/// machine's. Errors: kInvalidArgument for a MSA_THREADS that is no positive number.
Status num_threads(int32_t* count);
void set_num_threads(int32_t count);  ///< count >= 1

/// The plan of that problem, made at its first use. "auto" honours MSA_BACKEND as it is now.
/// Errors: those of msa::plan.
Status cached_plan(const Problem& problem, const Limits& limits, const std::string& backend,
                   Plan* out);

/// A thread team and scratch memory, for one call at a time.
struct Lane {
  explicit Lane(int count) : team(count) {}
  ~Lane() { release_memory(); }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// At least `bytes`, aligned to 64; kept for the next call. Throws std::bad_alloc.
  void* memory(size_t bytes);
  void release_memory();

  Threads team;
  void* data = nullptr;
  size_t capacity = 0;
};

struct GiveBack {
  void operator()(Lane* lane) const;
};
using LanePtr = std::unique_ptr<Lane, GiveBack>;

/// A lane with `threads` threads that nobody else uses until it is dropped.
LanePtr take_lane(int threads);

}  // namespace msa::python
