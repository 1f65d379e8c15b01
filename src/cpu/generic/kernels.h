// The table of one instruction set and element type.
#pragma once

#include "cpu/generic/attention.h"
#include "cpu/generic/backward.h"
#include "cpu/generic/index.h"
#include "cpu/generic/kl.h"
#include "cpu/kernels.h"

namespace msa::cpu {

template <class Isa>
int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  switch (problem.op) {
    case Op::kIndexScores:
    case Op::kIndexSelect:
      return index_bytes<Isa>(problem, limits);
    case Op::kSparseAttention:
      return attention_bytes<Isa>(problem, limits, true);
    case Op::kSparseAttentionBackward:
    case Op::kDenseAttentionBackward:
      return attention_backward_bytes<Isa>(problem, limits);
    case Op::kIndexLse:
      return index_lse_bytes<Isa>(problem, limits);
    case Op::kKlBackward:
    case Op::kKlLoss:
      return kl_bytes<Isa>(problem, limits);
    default:
      return attention_bytes<Isa>(problem, limits, false);
  }
}

/// Multiply-adds on registers alone, 12 sums to hide their latency: the ceiling of this instruction
/// set.
template <class Isa>
double burn() {
  constexpr int64_t kRounds = 1 << 16;
  if constexpr (Isa::kPair == 2) {
    return Isa::burn(kRounds);
  } else {
    typename Isa::Vec sum[12];
    for (auto& x : sum) x = Isa::set1(1.0f);
    typename Isa::Vec factor = Isa::set1(0.999f);
    for (int64_t i = 0; i < kRounds; ++i) {
#pragma GCC unroll 12
      for (auto& x : sum) x = Isa::fma(x, factor, factor);
      asm volatile("" : "+x"(factor));
    }
    for (auto& x : sum) asm volatile("" : "+x"(x));
    return 2.0 * 12 * Isa::kLanes * kRounds;
  }
}

template <class Isa>
constexpr Kernels kernels_of() {
  Kernels kernels{.workspace_bytes = workspace_bytes<Isa>,
                  .index_scores = run_index_scores<Isa>,
                  .index_select = run_index_select<Isa>,
                  .sparse_attention = run_sparse_attention<Isa>,
                  .dense_attention = run_dense_attention<Isa>,
                  .block_mass = run_block_mass<Isa>,
                  .attention_backward = nullptr,
                  .index_lse = nullptr,
                  .kl = nullptr,
                  .burn = burn<Isa>};
  if constexpr (Isa::kPair == 1) {
    kernels.attention_backward = run_attention_backward<Isa>;
    kernels.index_lse = run_index_lse<Isa>;
    kernels.kl = run_kl<Isa>;
  }
  return kernels;
}

}  // namespace msa::cpu
