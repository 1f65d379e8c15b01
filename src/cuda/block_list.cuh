// Lists of block ids, which nobody checked: the first negative id ends a list, and a block that a
// list names again counts once.
#pragma once

#include <cstdint>

namespace msa::cuda {

/// Whether a slot before `slot` of a list names the same block.
__device__ inline bool named_before(const int32_t* ids, int slot) {
  for (int i = 0; i < slot; ++i)
    if (ids[i] == ids[slot]) return true;
  return false;
}

/// Of lists of up to kLanes ids that lie in as many neighbouring lanes, slot after slot: whether
/// the list goes as far as this lane's id. All lanes of a warp together.
template <int kLanes>
__device__ inline bool is_listed(int id) {
  if (__all_sync(0xffffffff, id >= 0)) return true;
  const int lane = static_cast<int>(threadIdx.x % 32), slot = lane % kLanes;
  const uint32_t ends = __ballot_sync(0xffffffff, id < 0) >> (lane - slot);
  return (ends & ((2u << slot) - 1)) == 0;
}

/// Likewise, and has not named it before.
template <int kLanes>
__device__ inline bool counts(int id) {
  const int lane = static_cast<int>(threadIdx.x % 32), slot = lane % kLanes;
  const bool listed = is_listed<kLanes>(id);
  const int before = __shfl_up_sync(0xffffffff, id, 1);
  // Most lists ascend.
  if (__all_sync(0xffffffff, !listed || slot == 0 || before < id)) return listed;
  const uint32_t same = __match_any_sync(0xffffffff, id) >> (lane - slot);
  return listed && (same & ((1u << slot) - 1)) == 0;
}

}  // namespace msa::cuda
