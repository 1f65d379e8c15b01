// Gradients of queries, sparse and dense; what the kernel is given besides is made on the host.
#include <cuda_bf16.h>

#include <cmath>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/half.h"
#include "cuda/device.h"
#include "cuda/sm90/backward/query_gradient.h"
#include "cuda/sm90/prefill/config.h"
#include "cuda/tensor_map.h"
#include "family.h"

namespace emulator {
namespace {

using namespace msa;
using namespace msa::conformance;
namespace backward = msa::cuda::sm90::backward;
namespace prefill = msa::cuda::sm90::prefill;

/// f32 [T,Hkv,2,G]: lse * log2(e), +inf for -inf, then delta, of the same d_o that dP is made of.
std::vector<float> make_row_terms(const AttentionBackwardParams& a, const TensorView& d_o,
                                  int group) {
  const int64_t tokens = a.q.shape[0], heads = a.q.shape[1], dim = a.q.shape[2];
  std::vector<float> terms(static_cast<size_t>(tokens * heads * 2));
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      float delta = 0;
      for (int64_t d = 0; d < dim; ++d)
        delta += load_f32(a.o.data, a.o.dtype, a.o.offset(t, h, d)) *
                 load_f32(d_o.data, d_o.dtype, d_o.offset(t, h, d));
      const float lse = *a.lse.at<const float>(t, h);
      float* at = &terms[static_cast<size_t>((t * heads + h / group * group) * 2 + h % group)];
      at[0] = lse == -INFINITY ? INFINITY : lse * 1.44269504088896340736F;
      at[group] = delta;
    }
  }
  return terms;
}

/// The same values in bf16, without gaps. `memory` holds them.
TensorView to_bf16(const TensorView& from, std::vector<double>* memory) {
  memory->resize(static_cast<size_t>(from.numel()) / 4 + 2);
  const auto address = (reinterpret_cast<uintptr_t>(memory->data()) + 15) / 16 * 16;
  const TensorView to = TensorView::contiguous(reinterpret_cast<void*>(address), DType::kBF16,
                                               {from.shape[0], from.shape[1], from.shape[2]});
  for (int64_t t = 0; t < from.shape[0]; ++t)
    for (int64_t h = 0; h < from.shape[1]; ++h)
      for (int64_t d = 0; d < from.shape[2]; ++d)
        store_f32(to.data, to.dtype, to.offset(t, h, d),
                  load_f32(from.data, from.dtype, from.offset(t, h, d)));
  return to;
}

class QueryGradient final : public EmulatedBackend {
 public:
  QueryGradient() : EmulatedBackend("cuda") {}

  bool fits(const Problem& p) const override {
    return (p.op == Op::kSparseAttentionBackward || p.op == Op::kDenseAttentionBackward) &&
           p.dtype == DType::kBF16 && p.head_dim == prefill::kDim &&
           p.block_size == prefill::kBlock && p.topk <= prefill::kMostSlots &&
           (p.group() == 8 || p.group() == 16);
  }
  bool fits(const Params& params, const Limits&) const override {
    const auto& a = std::get<AttentionBackwardParams>(params);
    return cuda::aligned(a.q) && cuda::aligned(a.k) && cuda::aligned(a.v) && cuda::aligned(a.dq);
  }
  int64_t workspace_bytes(const Problem&, const Limits&) const override { return 0; }

  Status run(const Plan& plan, const AttentionBackwardParams& a, Workspace, Queue) const override {
    if (a.q.shape[0] == 0) return {};
    const int group = static_cast<int>(plan.problem.group());
    const auto boxes = static_cast<uint32_t>(group);
    std::vector<double> memory;
    const TensorView d_o = to_bf16(a.d_o, &memory);
    backward::QueryGradientMaps maps{};
    MSA_TRY(cuda::map_queries("q", a.q, boxes, 1, &maps.q));
    MSA_TRY(cuda::map_queries("d_o", d_o, boxes, 1, &maps.d_o));
    MSA_TRY(cuda::map_keys("k", a.k, KvLayout::kPacked, prefill::kBlock, &maps.k));
    MSA_TRY(cuda::map_keys("v", a.v, KvLayout::kPacked, prefill::kBlock, &maps.v));
    const std::vector<float> terms = make_row_terms(a, d_o, group);
    int32_t next_tile = 0;
    backward::QueryGradientArgs args{
        .batch = cuda::device_batch(a.batch, a.q.shape[0], a.k, prefill::kBlock),
        .row_terms = terms.data(),
        .dq = a.dq.data,
        .dq_token = a.dq.stride[0],
        .dq_head = a.dq.stride[1],
        .scale = a.softmax_scale == 0 ? 1 / std::sqrt(static_cast<float>(prefill::kDim))
                                      : a.softmax_scale,
        .heads_kv = static_cast<int>(plan.problem.heads_kv),
        .next_tile = &next_tile};
    if (a.ids.given())
      args.lists = {a.ids.at<const int32_t>(), a.ids.stride[0], a.ids.stride[1], plan.problem.topk};
    const auto start = [&]<class Out>(Out) {
      return group == 16 ? backward::launch_query_gradient<16, Out>(maps, args, kSMs, nullptr)
                         : backward::launch_query_gradient<8, Out>(maps, args, kSMs, nullptr);
    };
    return a.dq.dtype == DType::kF32 ? start(float{}) : start(__nv_bfloat16{});
  }
  using PartialBackend::run;
};

/// Sizes around those of tiles and blocks, and every feature of a batch.
std::vector<EmulatedCase> make_cases(const EmulatedBackend& backend) {
  std::vector<EmulatedCase> cases;
  const auto add = [&](const char* name, int group, int topk, std::vector<SequenceSize> sequences,
                       auto&& change) {
    Case c;
    c.name = name;
    c.problem = {.op = topk > 0 ? Op::kSparseAttentionBackward : Op::kDenseAttentionBackward,
                 .dtype = DType::kBF16,
                 .heads_kv = 1,
                 .topk = topk};
    c.sequences = std::move(sequences);
    change(c);
    c.problem.heads_q = group * c.problem.heads_kv;
    const bool bad_metadata = c.name.find("absurd") != std::string::npos;
    cases.push_back({fitting(std::move(c), backend), bad_metadata});
  };
  add("one tile", 16, 16, {{8, 8}}, [](Case&) {});
  add("one block", 16, 16, {{128, 128}}, [](Case&) {});
  add("ragged", 16, 16, {{1, 1}, {60, 60}, {0, 17}, {17, 17}, {5, 0}, {33, 140}}, [](Case&) {});
  add("long lists", 16, 16, {{21, 2500}}, [](Case&) {});
  add("G 8, two heads, absurd", 8, 16, {{20, 900}, {3, 257}, {27, 1300}},
      [](Case& c) { c.problem.heads_kv = 2; });
  add("G 8, K 1", 8, 1, {{200, 500}}, [](Case&) {});
  add("K 5, two heads, f32", 16, 5, {{33, 400}, {20, 777}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
    c.padded_rows = 21;
  });
  add("not causal", 16, 8, {{23, 400}, {10, 1100}}, [](Case& c) { c.causal = false; });
  add("more queries than keys", 16, 16, {{70, 40}}, [](Case&) {});
  add("strided, one list for all heads, absurd", 8, 8, {{40, 1000}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.strided = c.shared_ids = c.loose_limits = true;
  });
  add("many sequences", 16, 4, std::vector<SequenceSize>(35, {3, 300}), [](Case&) {});
  add("peaked", 16, 4, {{40, 700}}, [](Case& c) { c.values = Values::kPeaked; });
  add("offsets", 16, 8, {{30, 800, 500}, {9, 500, 0}}, [](Case& c) { c.q_offsets = true; });
  add("dense, ragged", 16, 0, {{1, 1}, {60, 60}, {0, 17}, {17, 17}, {5, 0}, {33, 140}},
      [](Case& c) { c.padded_rows = 5; });
  add("dense, one sequence", 16, 0, {{150, 400}}, [](Case&) {});
  add("dense, G 8, two heads, f32, absurd", 8, 0, {{100, 300}, {70, 40}, {19, 600}}, [](Case& c) {
    c.problem.heads_kv = 2;
    c.f32_outputs = true;
  });
  add("dense, strided, not causal", 8, 0, {{20, 200}, {30, 257}}, [](Case& c) {
    c.strided = true;
    c.causal = false;
  });
  add("dense, many sequences", 16, 0, std::vector<SequenceSize>(35, {3, 300}), [](Case&) {});
  return cases;
}

}  // namespace

Family make_family() {
  Family family;
  family.backends.push_back(std::make_unique<QueryGradient>());
  family.cases = make_cases(*family.backends[0]);
  family.partial = true;
  return family;
}

}  // namespace emulator
