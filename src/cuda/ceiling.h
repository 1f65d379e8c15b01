// What a GPU can do at best, measured: the yardstick printed beside every timing. These functions
// allocate and wait; no operator calls them.
#pragma once

namespace msa::cuda {

/// FLOP/s of bf16 matrix products on random operands in shared memory, all SMs busy; 0 where there
/// is no wgmma to measure with. The median of a tenth of a second: the clock has settled by then.
double peak_flops(int device);

/// Bytes/s of reading memory much larger than the caches. Takes about 0.1 s and 4 GiB (or less,
/// when less is free); 0 when there is no memory at all.
double read_bandwidth(int device);

}  // namespace msa::cuda
