// What this machine can do at best, measured: the yardstick printed beside every timing.
#pragma once

#include "msa/backend.h"

namespace msa::cpu {

/// FLOP/s of multiply-adds on registers, all threads busy, with the instructions `backend` uses
/// (the widest there are for backends without vector kernels); 0 for a backend that is not usable.
/// Takes about 0.1 s.
double peak_flops(const Backend& backend, Threads& threads);

/// Bytes/s of reading memory much larger than the caches, all threads busy. Takes about 0.3 s and
/// 512 MiB.
double read_bandwidth(Threads& threads);

}  // namespace msa::cpu
