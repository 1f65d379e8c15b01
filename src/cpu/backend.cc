// The CPU backends: a table of kernels for each instruction set, and what needs none.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <iterator>
#include <vector>

#include "core/layer.h"
#include "core/op_table.h"
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

Refusal fits(const Problem& p, const Limits&) {
  const uint32_t uses = info_of(p.op).uses;
  if ((uses & kHeadDim) != 0) {
    if (p.head_dim > cpu::kMaxHeadDim) return {"head_dim", nullptr, p.head_dim, "1..256"};
    if (p.group() > cpu::kMaxGroup) return {"heads_q / heads_kv", nullptr, p.group(), "1..64"};
  }
  if ((uses & kIndexDim) != 0) {
    if (p.index_dim > cpu::kMaxHeadDim) return {"index_dim", nullptr, p.index_dim, "1..256"};
    if (p.heads_kv > cpu::kMaxIndexHeads) return {"heads_kv", nullptr, p.heads_kv, "1..256"};
  }
  if ((uses & kTopk) != 0 && !is_training(p.op) && p.topk > cpu::kMaxTopK)
    return {"topk", nullptr, p.topk, "1..256"};
  return {};
}

Refusal fits_bf16(const Problem& p, const Limits& limits) {
  if (p.dtype != DType::kBF16) return {"dtype", name_of(p.dtype), 0, "bf16"};
  return fits(p, limits);
}

template <const Kernels& Isa, class Params,
          void (*Kernels::*Compute)(const Plan&, const Params&, Workspace, Queue)>
Status run(const Plan& plan, const ParamsRef& params, Workspace workspace, Queue queue) {
  MSA_TRY(cpu::check_team(plan, queue));
  (Isa.*Compute)(plan, params.as<Params>(), workspace, queue);
  return {};
}

template <const Kernels& Isa>
int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  return Isa.workspace_bytes(problem, limits);
}

/// The operators of an instruction set. AMX multiplies bf16 alone and does not train.
template <const Kernels& Isa>
std::vector<Kernel> kernels(const char* name, bool amx) {
  std::vector<Kernel> all;
  const auto add =
      [&]<class Params, void (*Kernels::*Compute)(const Plan&, const Params&, Workspace, Queue)>() {
        for (Op op : Params::kOps) {
          if (amx && is_training(op)) continue;
          all.push_back({.op = op,
                         .name = name,
                         .fits = amx ? fits_bf16 : fits,
                         .workspace_bytes = workspace_bytes<Isa>,
                         .run = run<Isa, Params, Compute>,
                         .rounds_probabilities = amx});
        }
      };
  add.template operator()<IndexScoresParams, &Kernels::index_scores>();
  add.template operator()<IndexSelectParams, &Kernels::index_select>();
  add.template operator()<SparseAttentionParams, &Kernels::sparse_attention>();
  add.template operator()<DenseAttentionParams, &Kernels::dense_attention>();
  add.template operator()<BlockMassParams, &Kernels::block_mass>();
  add.template operator()<AttentionBackwardParams, &Kernels::attention_backward>();
  add.template operator()<IndexLseParams, &Kernels::index_lse>();
  add.template operator()<KlParams, &Kernels::kl>();
  all.push_back(kLayerSteps);
  if (!amx) std::ranges::copy(cpu::plain_kernels(), std::back_inserter(all));
  return all;
}

constexpr const char* kAvx2Needs = "x86-64 with AVX2, FMA and F16C";
constexpr const char* kAvx512Needs = "x86-64 with AVX-512 F, BW, DQ and VL";
constexpr const char* kAmxNeeds = "x86-64 with AMX-BF16 and AVX512-BF16; bf16 tensors";

Status usable(const char* requirement, const char* missing) {
  if (missing == nullptr) return {};
  return error(StatusCode::kUnavailable, "needs ", requirement, "; this machine lacks ", missing);
}

}  // namespace

const Backend* avx2_backend() {
  static const auto all = kernels<cpu::kAvx2>("avx2", false);
  static const Backend backend{
      "avx2", kAvx2Needs, 10, DeviceKind::kCPU, [] { return usable(kAvx2Needs, missing_avx2()); },
      all};
  return &backend;
}

const Backend* avx512_backend() {
  static const auto all = kernels<cpu::kAvx512>("avx512", false);
  static const Backend backend{"avx512",
                               kAvx512Needs,
                               20,
                               DeviceKind::kCPU,
                               [] { return usable(kAvx512Needs, missing_avx512()); },
                               all};
  return &backend;
}

const Backend* amx_backend() {
  static const auto all = kernels<cpu::kAmx>("amx", true);
  static const Backend backend{
      "amx", kAmxNeeds, 30, DeviceKind::kCPU, [] { return usable(kAmxNeeds, missing_amx()); }, all};
  return &backend;
}

namespace cpu {

double (*burn_of(const Backend& backend))() {
  if (&backend == avx2_backend()) return kAvx2.burn;
  if (&backend == avx512_backend()) return kAvx512.burn;
  return &backend == amx_backend() ? kAmx.burn : nullptr;
}

}  // namespace cpu
}  // namespace msa
