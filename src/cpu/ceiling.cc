#include "cpu/ceiling.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace msa::cpu {
namespace {

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/// Scalar multiply-adds, for machines or backends without kernels of their own.
double burn_scalar() {
  constexpr int kRounds = 1 << 16;
  float sum[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  for (int i = 0; i < kRounds; ++i) {
    for (float& x : sum) x = x * 0.999f + 0.001f;
  }
  volatile float keep = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
  (void)keep;
  return 2.0 * 8 * kRounds;
}

}  // namespace

double peak_flops(const Backend& backend, Threads& threads) {
  if (!backend.usable()) return 0;  // asking also obtains the right to use AMX tiles
  double (*burn)() = burn_scalar;
#if MSA_WITH_X86
  if (burn_of(backend) != nullptr) burn = burn_of(backend);
#endif
  double best = 0;
  for (int round = 0; round < 5; ++round) {
    std::vector<double> flops(static_cast<size_t>(threads.count()));
    const double start = seconds();
    threads.parallel_for(int64_t{threads.count()} * 64, [&](int64_t, int worker) {
      flops[static_cast<size_t>(worker)] += burn();
    });
    const double time = seconds() - start;
    double sum = 0;
    for (double f : flops) sum += f;
    best = std::max(best, sum / time);
  }
  return best;
}

double read_bandwidth(Threads& threads) {
  constexpr int64_t kWords = (int64_t{512} << 20) / 8, kSlices = 256;
  std::vector<uint64_t> memory(static_cast<size_t>(kWords));
  for (size_t i = 0; i < memory.size(); ++i) memory[i] = i * 0x9e3779b97f4a7c15u;
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int round = 0; round < 4; ++round) {
    const double start = seconds();
    threads.parallel_for(kSlices, [&](int64_t slice, int) {
      const uint64_t* p = memory.data() + slice * (kWords / kSlices);
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < kWords / kSlices; i += 8) {
        for (int64_t lane = 0; lane < 8; ++lane) sum[lane] += p[i + lane];
      }
      for (uint64_t x : sum) total += x;
    });
    best = std::max(best, static_cast<double>(kWords) * 8 / (seconds() - start));
  }
  return best;
}

}  // namespace msa::cpu
