// The CPU backends: one class, a table of kernels for each instruction set.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <string_view>

#include "core/registry.h"
#include "core/text.h"
#include "cpu/generic/limits.h"
#include "cpu/kernels.h"
#include "cpu/plain.h"

namespace msa {
namespace {

using cpu::Kernels;

const char* missing_avx2() {
  if (!__builtin_cpu_supports("avx2")) return "AVX2";
  if (!__builtin_cpu_supports("fma")) return "FMA";
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c ? nullptr : "F16C";
}

const char* missing_avx512() {
  if (const char* missing = missing_avx2()) return missing;
  if (!__builtin_cpu_supports("avx512f")) return "AVX-512F";
  if (!__builtin_cpu_supports("avx512bw")) return "AVX-512BW";
  if (!__builtin_cpu_supports("avx512dq")) return "AVX-512DQ";
  return __builtin_cpu_supports("avx512vl") ? nullptr : "AVX-512VL";
}

const char* missing_amx() {
  if (const char* missing = missing_avx512()) return missing;
  if (!__builtin_cpu_supports("avx512bf16")) return "AVX512-BF16";
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d >> 24 & 1) == 0) return "AMX-TILE";
  if ((d >> 22 & 1) == 0) return "AMX-BF16";
  constexpr int kRequestPermission = 0x1023,
                kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted ? nullptr : "permission of the operating system for AMX tiles";
}

class CpuBackend : public Backend {
 public:
  CpuBackend(const char* name, const char* requirement, int priority, const Kernels& kernels,
             const char* (*missing)(), bool bf16_only)
      : name_(name),
        requirement_(requirement),
        priority_(priority),
        kernels_(kernels),
        missing_(missing),
        bf16_only_(bf16_only) {}

  const char* name() const override { return name_; }
  const char* requirement() const override { return requirement_; }
  int priority() const override { return priority_; }
  DeviceKind device() const override { return DeviceKind::kCPU; }

  Status usable() const override {
    const char* missing = missing_();
    if (missing == nullptr) return {};
    return error(StatusCode::kUnavailable, "needs ", requirement_, "; this machine lacks ",
                 missing);
  }

  Status supports(const Problem& p) const override {
    const auto refuse = [](const char* field, auto value, const char* supported) {
      return error(StatusCode::kUnsupported, field, ": got ", value, ", supported: ", supported);
    };
    const bool attends = p.op == Op::kSparseAttention || p.op == Op::kSparseDecode ||
                         p.op == Op::kDenseAttention || p.op == Op::kBlockMass ||
                         (is_training(p.op) && p.op != Op::kIndexLse);
    const bool indexes = p.op == Op::kIndexScores || p.op == Op::kIndexSelect ||
                         p.op == Op::kIndexLse || p.op == Op::kKlBackward || p.op == Op::kKlLoss;
    if (bf16_only_ && is_training(p.op))
      return refuse("op", name_of(p.op), "the forward operators; training is in f32");
    if (bf16_only_ && (attends || indexes) && p.dtype != DType::kBF16)
      return refuse("dtype", name_of(p.dtype), "bf16");
    if (bf16_only_ && !attends && !indexes)
      return refuse("op", name_of(p.op), "attention and index operators");
    if (attends && p.head_dim > cpu::kMaxHeadDim) return refuse("head_dim", p.head_dim, "1..256");
    if (attends && p.group() > cpu::kMaxGroup)
      return refuse("heads_q / heads_kv", p.group(), "1..64");
    if (indexes && p.index_dim > cpu::kMaxHeadDim)
      return refuse("index_dim", p.index_dim, "1..256");
    if (indexes && p.heads_kv > cpu::kMaxIndexHeads)
      return refuse("heads_kv", p.heads_kv, "1..256");
    const bool lists = p.op == Op::kIndexSelect || p.op == Op::kSelectBlocks ||
                       p.op == Op::kSparseAttention || p.op == Op::kSparseDecode;
    if (lists && p.topk > cpu::kMaxTopK) return refuse("topk", p.topk, "1..256");
    return {};
  }

  int64_t workspace_bytes(const Problem& p, const Limits& limits) const override {
    switch (p.op) {
      case Op::kSelectBlocks:
        return cpu::select_blocks_bytes(p, limits);
      case Op::kMerge:
      case Op::kBlockLists:
      case Op::kAppendPaged:
        return 0;
      default:
        return kernels_.workspace_bytes(p, limits);
    }
  }

  Status run(const Plan& plan, const IndexScoresParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.index_scores(plan, a, w, q); });
  }
  Status run(const Plan& plan, const SelectBlocksParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { cpu::select_blocks(plan, a, w, q); });
  }
  Status run(const Plan& plan, const IndexSelectParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.index_select(plan, a, w, q); });
  }
  Status run(const Plan& plan, const SparseAttentionParams& a, Workspace w,
             Queue q) const override {
    return with_team(plan, q, [&] { kernels_.sparse_attention(plan, a, w, q); });
  }
  Status run(const Plan& plan, const DenseAttentionParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.dense_attention(plan, a, w, q); });
  }
  Status run(const Plan& plan, const MergeParams& a, Workspace, Queue q) const override {
    return with_team(plan, q, [&] { cpu::merge(plan, a, q); });
  }
  Status run(const Plan& plan, const BlockListsParams& a, Workspace, Queue q) const override {
    return with_team(plan, q, [&] { cpu::block_lists(plan, a, q); });
  }
  Status run(const Plan& plan, const AppendPagedParams& a, Workspace, Queue q) const override {
    return with_team(plan, q, [&] { cpu::append_paged(plan, a, q); });
  }
  Status run(const Plan& plan, const BlockMassParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.block_mass(plan, a, w, q); });
  }
  Status run(const Plan& plan, const AttentionBackwardParams& a, Workspace w,
             Queue q) const override {
    return with_team(plan, q, [&] { kernels_.attention_backward(plan, a, w, q); });
  }
  Status run(const Plan& plan, const IndexLseParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.index_lse(plan, a, w, q); });
  }
  Status run(const Plan& plan, const KlParams& a, Workspace w, Queue q) const override {
    return with_team(plan, q, [&] { kernels_.kl(plan, a, w, q); });
  }

  const Kernels& kernels() const { return kernels_; }

 private:
  /// The workspace has one slice per planned worker.
  template <class Work>
  static Status with_team(const Plan& plan, Queue queue, const Work& work) {
    if (queue.threads != nullptr && queue.threads->count() > plan.limits.max_threads) {
      return invalid("queue.threads: got ", queue.threads->count(), " threads, the plan allows ",
                     plan.limits.max_threads, " (Limits::max_threads)");
    }
    work();
    return {};
  }

  const char* name_;
  const char* requirement_;
  int priority_;
  const Kernels& kernels_;
  const char* (*missing_)();
  bool bf16_only_;
};

const CpuBackend& avx2() {
  static const CpuBackend backend("avx2", "x86-64 with AVX2, FMA and F16C", 10, cpu::kAvx2,
                                  missing_avx2, false);
  return backend;
}
const CpuBackend& avx512() {
  static const CpuBackend backend("avx512", "x86-64 with AVX-512 F, BW, DQ and VL", 20,
                                  cpu::kAvx512, missing_avx512, false);
  return backend;
}
const CpuBackend& amx() {
  static const CpuBackend backend("amx", "x86-64 with AMX-BF16 and AVX512-BF16; bf16 tensors", 30,
                                  cpu::kAmx, missing_amx, true);
  return backend;
}

}  // namespace

const Backend* avx2_backend() { return &avx2(); }
const Backend* avx512_backend() { return &avx512(); }
const Backend* amx_backend() { return &amx(); }

namespace cpu {

const Kernels* kernels_named(std::string_view backend) {
  for (const CpuBackend* known : {&avx2(), &avx512(), &amx()}) {
    if (backend == known->name()) return &known->kernels();
  }
  return nullptr;
}

}  // namespace cpu
}  // namespace msa
