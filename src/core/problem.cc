#include "msa/problem.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "core/text.h"

namespace msa {
namespace {

// Which fields of a Problem an operator reads; the others are ignored.
constexpr int kHeadsQ = 1, kHeadsKv = 2, kHeadDim = 4, kIndexDim = 8, kBlock = 16, kTopk = 32,
              kForced = 64;
constexpr int kUses[kOpCount] = {
    kHeadsKv | kIndexDim | kBlock,                                         // index_scores
    kHeadsKv | kBlock | kTopk | kForced,                                   // select_blocks
    kHeadsKv | kIndexDim | kBlock | kTopk | kForced,                       // index_select
    kHeadsQ | kHeadsKv | kHeadDim | kBlock | kTopk,                        // sparse_attention
    kHeadsQ | kHeadsKv | kHeadDim | kBlock | kTopk,                        // sparse_decode
    kHeadsQ | kHeadsKv | kHeadDim | kBlock,                                // dense_attention
    kHeadsQ | kHeadDim,                                                    // merge
    kHeadsKv | kBlock | kTopk,                                             // block_lists
    kHeadsKv | kHeadDim | kIndexDim | kBlock,                              // append_paged
    kHeadsQ | kHeadsKv | kHeadDim | kBlock,                                // block_mass
    kHeadsQ | kHeadsKv | kHeadDim | kIndexDim | kBlock | kTopk | kForced,  // msa_layer_decode
    kHeadsQ | kHeadsKv | kHeadDim | kBlock | kTopk,              // sparse_attention_backward
    kHeadsQ | kHeadsKv | kHeadDim | kBlock,                      // dense_attention_backward
    kHeadsKv | kIndexDim | kBlock | kTopk,                       // index_lse
    kHeadsQ | kHeadsKv | kHeadDim | kIndexDim | kBlock | kTopk,  // kl_backward
    kHeadsQ | kHeadsKv | kHeadDim | kIndexDim | kBlock | kTopk,  // kl_loss
};

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

Status validate(const Problem& p) {
  const int op = static_cast<int>(p.op);
  if (op < 0 || op >= kOpCount)
    return invalid("op: got ", op, ", expected 0..", kOpCount - 1, " (an msa::Op)");
  const int uses = kUses[op];
  if (p.dtype != DType::kF32 && p.dtype != DType::kBF16 && p.dtype != DType::kF16)
    return invalid("dtype: got ", name_of(p.dtype), ", expected f32, bf16 or f16");
  if (p.layout != KvLayout::kPacked && p.layout != KvLayout::kPaged)
    return invalid("layout: got ", static_cast<int>(p.layout),
                   ", expected 0 (packed) or 1 (paged)");
  if (p.device.kind != DeviceKind::kCPU && p.device.kind != DeviceKind::kCUDA)
    return invalid("device: got kind ", static_cast<int>(p.device.kind),
                   ", expected 1 (CPU) or 2 (CUDA)");
  if ((p.op == Op::kAppendPaged || p.op == Op::kLayerDecode) && p.layout != KvLayout::kPaged)
    return invalid("layout: got packed, ", name_of(p.op), " works on paged caches only");
  if (is_training(p.op) && p.layout != KvLayout::kPacked)
    return invalid("layout: got paged, ", name_of(p.op), " takes packed keys only");
  if (uses & kHeadsQ) MSA_TRY(at_least("heads_q", p.heads_q, 1));
  if (uses & kHeadsKv) MSA_TRY(at_least("heads_kv", p.heads_kv, 1));
  if ((uses & kHeadsQ) && (uses & kHeadsKv) && p.heads_q % p.heads_kv != 0)
    return invalid("heads_q: got ", p.heads_q, ", expected a multiple of heads_kv = ", p.heads_kv);
  if (uses & kHeadDim) MSA_TRY(at_least("head_dim", p.head_dim, 1));
  if (uses & kIndexDim) MSA_TRY(at_least("index_dim", p.index_dim, 1));
  if (uses & kBlock) MSA_TRY(at_least("block_size", p.block_size, 1));
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
        std::pair{"max_q_len", limits.max_q_len}, std::pair{"max_kv_len", limits.max_kv_len}}) {
    if (value < 0 || value > INT32_MAX)
      return invalid(name, ": got ", value, ", expected 0..", INT32_MAX);
  }
  return at_least("max_threads", limits.max_threads, 0);
}

Cost cost(const Problem& p, int64_t q_len, int64_t kv_len) {
  const Pairs pairs = count_pairs(p, q_len, kv_len);
  const double element = static_cast<double>(size_of(p.dtype));
  const double tokens = static_cast<double>(q_len);
  const double keys = static_cast<double>(kv_len);
  const double blocks = static_cast<double>((kv_len + block_tokens(p) - 1) / block_tokens(p));
  const double heads_kv = p.heads_kv;
  // Sizes in bytes of what the operators read and write.
  const double q = tokens * p.heads_q * p.head_dim * element;
  const double lse = tokens * p.heads_q * 4;
  const double kv_row = heads_kv * p.head_dim * element;  // K or V of one token, all heads
  const double q_idx = tokens * heads_kv * p.index_dim * element;
  const double k_idx = keys * p.index_dim * element;
  const double ids = heads_kv * tokens * p.topk * 4;
  const double scores = heads_kv * tokens * blocks * 4;
  const double pair_flops = 4.0 * p.heads_q * p.head_dim;
  const double index_pair_flops = 2.0 * heads_kv * p.index_dim;
  const double index_flops = index_pair_flops * pairs.dense;
  const double index_lse = heads_kv * tokens * 4;
  const double kl_bytes = q + lse + keys * kv_row + q_idx + k_idx + index_lse + ids;

  switch (p.op) {
    case Op::kIndexScores:
      return {index_flops, q_idx + k_idx + scores};
    case Op::kSelectBlocks:
      return {0, scores + ids};
    case Op::kIndexSelect:
      return {index_flops, q_idx + k_idx + ids};
    case Op::kSparseAttention:
    case Op::kSparseDecode: {
      // Few tokens read their own blocks; many of them together read the whole context.
      const double kv_rows = q_len <= 16 ? pairs.sparse : keys;
      return {pair_flops * pairs.sparse, 2 * q + lse + ids + 2 * kv_rows * kv_row};
    }
    case Op::kDenseAttention:
      return {pair_flops * pairs.dense, 2 * q + lse + 2 * keys * kv_row};
    case Op::kMerge:
      return {0, 3 * (q + lse)};
    case Op::kBlockLists:
      return {0, 2 * ids + heads_kv * (blocks + 1) * 4};
    case Op::kAppendPaged:
      return {0, 2 * tokens * (2 * kv_row + p.index_dim * element)};
    case Op::kBlockMass:
      return {pair_flops / 2 * pairs.dense, q + lse + keys * kv_row + scores};
    case Op::kLayerDecode:
      return {index_flops + pair_flops * pairs.sparse,
              q_idx + k_idx + 2 * q + lse + 2 * pairs.sparse * kv_row};
    case Op::kSparseAttentionBackward:
      return {pair_flops / 2 * 5 * pairs.sparse, 4 * q + lse + ids + 4 * keys * kv_row};
    case Op::kDenseAttentionBackward:
      return {pair_flops / 2 * 5 * pairs.dense, 4 * q + lse + 4 * keys * kv_row};
    case Op::kIndexLse:
      return {index_pair_flops * pairs.sparse, q_idx + k_idx + ids + index_lse};
    case Op::kKlBackward:
      return {(pair_flops / 2 + 3 * index_pair_flops) * pairs.sparse, kl_bytes + q_idx + k_idx};
    case Op::kKlLoss:
      return {(pair_flops / 2 + index_pair_flops) * pairs.sparse, kl_bytes + index_lse};
  }
  return {};
}

double paper_flop_ratio(const Problem& p, int64_t context) {
  const double n = static_cast<double>(context);
  const double attention = 2.0 * p.heads_q * p.head_dim;
  const double index = 1.0 * p.heads_kv * p.index_dim;
  return attention * n * n / (index * n * n + 2 * attention * n * p.topk * p.block_size);
}

}  // namespace msa
