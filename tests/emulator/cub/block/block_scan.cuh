// Stand-in for cub::BlockScan.
#pragma once

#include "cuda_runtime.h"

namespace cub {

template <class T, int kThreads>
class BlockScan {
 public:
  struct TempStorage {
    T values[kThreads];
  };
  explicit BlockScan(TempStorage& storage) : values_(storage.values) {}

  /// `before` = the sum over the threads ahead of this one, `all` over all of them.
  void ExclusiveSum(T value, T& before, T& all) {
    values_[threadIdx.x] = value;
    __syncthreads();
    before = all = 0;
    for (unsigned i = 0; i < kThreads; ++i) {
      if (i == threadIdx.x) before = all;
      all += values_[i];
    }
    __syncthreads();
    values_[threadIdx.x] = -777;  // whoever uses the storage again must have waited
  }
  /// The same sum, the own value included.
  void InclusiveSum(T value, T& sum, T& all) {
    T before;
    ExclusiveSum(value, before, all);
    sum = before + value;
  }

 private:
  T* values_;
};

}  // namespace cub
