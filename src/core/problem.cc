#include "msa/problem.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "core/op_table.h"
#include "core/text.h"

namespace msa {
namespace {

Status at_least(const char* name, int64_t value, int64_t low) {
  if (value >= low) return {};
  return invalid(name, ": got ", value, ", expected >= ", low);
}

/// Bk, also where the operator ignores the field and it may hold anything.
int64_t block_tokens(const Problem& p) { return std::max(1, p.block_size); }

/// (query, key) pairs of one sequence, and the sum over queries of min(K, visible) blocks' keys.
struct Pairs {
  double dense = 0;
  double sparse = 0;
};

Pairs count_pairs(const Problem& p, int64_t q_len, int64_t kv_len) {
  const int64_t block = block_tokens(p);
  Pairs pairs;
  for (int64_t visible = kv_len - q_len + 1; visible <= kv_len; ++visible) {
    const int64_t whole = (visible - 1) / block;  // blocks before the local one
    const int64_t skipped = std::max<int64_t>(0, whole - (p.topk - 1));
    pairs.dense += static_cast<double>(visible);
    pairs.sparse += static_cast<double>(visible - skipped * block);
  }
  return pairs;
}

}  // namespace

const char* name_of(DType dtype) {
  static constexpr std::array names = {"f32", "bf16", "f16", "i32", "e4m3", "i8", "e2m1"};
  const auto i = static_cast<size_t>(dtype);
  return i < names.size() ? names[i] : "unknown";
}

Status validate(const Problem& p) {
  const OpInfo* info = find_op(p.op);
  if (info == nullptr)
    return invalid("op: got ", static_cast<int>(p.op), ", expected an msa::Op, 0..",
                   static_cast<int>(all_ops().back().op));
  const uint32_t uses = info->uses;
  if (p.dtype != DType::kF32 && p.dtype != DType::kBF16 && p.dtype != DType::kF16)
    return invalid("dtype: got ", name_of(p.dtype), ", expected f32, bf16 or f16");
  if (p.layout != KvLayout::kPacked && p.layout != KvLayout::kPaged)
    return invalid("layout: got ", static_cast<int>(p.layout),
                   ", expected 0 (packed) or 1 (paged)");
  if (p.device.kind != DeviceKind::kCPU && p.device.kind != DeviceKind::kCUDA)
    return invalid("device: got kind ", static_cast<int>(p.device.kind),
                   ", expected 1 (CPU) or 2 (CUDA)");
  if ((uses & kPagedOnly) != 0 && p.layout != KvLayout::kPaged)
    return invalid("layout: got packed, ", name_of(p.op), " works on paged caches only");
  if ((uses & kPackedOnly) != 0 && p.layout != KvLayout::kPacked)
    return invalid("layout: got paged, ", name_of(p.op), " takes packed keys only");
  if (uses & kHeadsQ) MSA_TRY(at_least("heads_q", p.heads_q, 1));
  if (uses & kHeadsKv) MSA_TRY(at_least("heads_kv", p.heads_kv, 1));
  if ((uses & kHeadsQ) && (uses & kHeadsKv) && p.heads_q % p.heads_kv != 0)
    return invalid("heads_q: got ", p.heads_q, ", expected a multiple of heads_kv = ", p.heads_kv);
  if (uses & kHeadDim) MSA_TRY(at_least("head_dim", p.head_dim, 1));
  if (uses & kIndexDim) MSA_TRY(at_least("index_dim", p.index_dim, 1));
  if (uses & kBlockSize) MSA_TRY(at_least("block_size", p.block_size, 1));
  if (uses & kTopk) MSA_TRY(at_least("topk", p.topk, 1));
  if (uses & kForced) {
    MSA_TRY(at_least("init_blocks", p.init_blocks, 0));
    MSA_TRY(at_least("local_blocks", p.local_blocks, 0));
    if (int64_t{p.init_blocks} + p.local_blocks > p.topk)
      return invalid("init_blocks + local_blocks: got ", p.init_blocks, " + ", p.local_blocks,
                     ", expected at most topk = ", p.topk);
  }
  return {};
}

Status validate(const Limits& limits) {
  // Lengths and ids travel as int32; the bound also keeps workspace sizes far from overflow.
  for (const auto& [name, value] :
       {std::pair{"max_batch", limits.max_batch}, std::pair{"max_tokens", limits.max_tokens},
        std::pair{"max_seqlen_q", limits.max_seqlen_q},
        std::pair{"max_seqlen_k", limits.max_seqlen_k}}) {
    if (value < 0 || value > INT32_MAX)
      return invalid(name, ": got ", value, ", expected 0..", INT32_MAX);
  }
  return at_least("max_threads", limits.max_threads, 0);
}

Cost cost(const Problem& p, int64_t q_len, int64_t kv_len) {
  const Pairs pairs = count_pairs(p, q_len, kv_len);
  CostTerms c{};
  c.tokens = static_cast<double>(q_len);
  c.keys = static_cast<double>(kv_len);
  c.blocks = static_cast<double>((kv_len + block_tokens(p) - 1) / block_tokens(p));
  c.element = static_cast<double>(size_of(p.dtype));
  c.dense_pairs = pairs.dense;
  c.sparse_pairs = pairs.sparse;
  const double heads_kv = p.heads_kv;
  c.pair_flops = 4.0 * p.heads_q * p.head_dim;
  c.index_pair_flops = 2.0 * heads_kv * p.index_dim;
  c.q = c.tokens * p.heads_q * p.head_dim * c.element;
  c.lse = c.tokens * p.heads_q * 4;
  c.kv_row = heads_kv * p.head_dim * c.element;
  c.q_idx = c.tokens * heads_kv * p.index_dim * c.element;
  c.k_idx = c.keys * p.index_dim * c.element;
  c.index_lse = heads_kv * c.tokens * 4;
  c.ids = heads_kv * c.tokens * p.topk * 4;
  c.scores = heads_kv * c.tokens * c.blocks * 4;
  return info_of(p.op).cost(p, c);
}

double paper_flop_ratio(const Problem& p, int64_t context) {
  const double n = static_cast<double>(context);
  const double attention = 2.0 * p.heads_q * p.head_dim;
  const double index = 1.0 * p.heads_kv * p.index_dim;
  return attention * n * n / (index * n * n + 2 * attention * n * p.topk * p.block_size);
}

}  // namespace msa
