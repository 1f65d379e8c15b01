// What an instruction set gives to the CPU backends: one table of kernels per element type.
// The tables are defined in avx2/, avx512/ and amx/ (compiled for their instruction sets) and used
// from backend.cc (compiled for the baseline), so that nothing else of those files is ever linked
// in by name.
#pragma once

#include "msa/backend.h"

namespace msa::cpu {

/// Kernels of one instruction set and element type. Arguments are checked, workspaces large enough.
struct Kernels {
  int64_t (*workspace_bytes)(const Problem&, const Limits&);
  void (*index_scores)(const Plan&, const IndexScoresParams&, Workspace, Queue);
  void (*index_select)(const Plan&, const IndexSelectParams&, Workspace, Queue);
  void (*sparse_attention)(const Plan&, const SparseAttentionParams&, Workspace, Queue);
  void (*dense_attention)(const Plan&, const DenseAttentionParams&, Workspace, Queue);
  void (*block_mass)(const Plan&, const BlockMassParams&, Workspace, Queue);
  // Training is in f32: null for 16-bit pairs.
  void (*attention_backward)(const Plan&, const AttentionBackwardParams&, Workspace, Queue);
  void (*index_lse)(const Plan&, const IndexLseParams&, Workspace, Queue);
  void (*kl)(const Plan&, const KlParams&, Workspace, Queue);
  /// Multiply-adds on registers alone, some 0.1 ms of one thread: returns the FLOPs it did.
  double (*burn)();
};

/// y [m,n] = x [m,k] w^T for LinearWeight (linear.h). w lies in panels of `columns` outputs,
/// [k][columns] each, zeros in the columns past n.
struct LinearKernel {
  int64_t columns;
  void (*multiply)(const float* x, int64_t ldx, int64_t m, const float* panels, int64_t n,
                   int64_t k, float* y, int64_t ldy, Threads& threads);
};

extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Kernels kAmx;
extern const LinearKernel kAvx2Linear;
extern const LinearKernel kAvx512Linear;

/// Kernels::burn of a backend, null for those without a table.
double (*burn_of(const Backend& backend))();

}  // namespace msa::cpu
