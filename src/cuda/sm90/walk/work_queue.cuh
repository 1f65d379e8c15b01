// Work dealt to all CTAs by one counter.
#pragma once

#include <cstdint>

namespace msa::cuda::sm90::walk {

/// One warp; each piece is fetched while the one before is worked on. A Source has a type Work,
/// counter(), and read(number, &work): false where there is no piece of that number.
template <class Source>
class WorkQueue {
 public:
  using Work = typename Source::Work;

  template <class... Args>
  __device__ explicit WorkQueue(const Args&... args) : source_(args...) {
    take();
    fetch();
  }

  /// Work{} when all is taken.
  __device__ Work next() {
    const Work work = ahead_;
    fetch();
    return work;
  }

 private:
  /// Lane 0 takes a number; nobody waits for it here.
  __device__ void take() {
    if (threadIdx.x % 32 == 0) number_ = atomicAdd(source_.counter(), 1);
  }
  __device__ void fetch() {
    const int number = __shfl_sync(0xffffffff, number_, 0);
    ahead_ = {};
    if (source_.read(number, &ahead_)) take();
  }

  Source source_;
  int number_ = 0;
  Work ahead_{};
};

}  // namespace msa::cuda::sm90::walk
