#include "core/op_table.h"

#include <algorithm>
#include <array>
#include <iterator>

#include "core/check.h"

namespace msa {
namespace {

using enum Role;
using enum Content;

// ---- arguments, in the order of the structs -----------------------------------------------------

#define ARGUMENT(member) #member, offsetof(Params, member)
constexpr const char* kKeys = "S,Hkv,D|P,Hkv,Bk,D";
constexpr const char* kIndexKeys = "S,Di|P,Bk,Di";

struct IndexScoresTable {
  using Params = IndexScoresParams;
  static constexpr Argument kArguments[] = {
      {ARGUMENT(q_idx), kInput, kRows, "T,Hi,Di"},
      {ARGUMENT(k_idx), kInput, kRows, kIndexKeys},
      {ARGUMENT(batch), kBatch},
      {ARGUMENT(scores), kOutput, kF32, "Hi,T,blocks", nullptr, /*any_strides=*/true}};
};

struct SelectBlocksTable {
  using Params = SelectBlocksParams;
  static constexpr Argument kArguments[] = {
      {ARGUMENT(scores), kInput, kF32, "Hi,T,blocks", nullptr, /*any_strides=*/true},
      {ARGUMENT(num_valid_blocks), kOptional, kI32, "T"},
      {ARGUMENT(block_ids), kOutput, kBlocks, "Hi,T,K"}};
};

struct IndexSelectTable {
  using Params = IndexSelectParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q_idx), kInput, kRows, "T,Hi,Di"},
                                            {ARGUMENT(k_idx), kInput, kRows, kIndexKeys},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(block_ids), kOutput, kBlocks, "Hi,T,K"},
                                            {ARGUMENT(scores), kExtra, kF32, "Hi,T,K"}};
};

struct SparseAttentionTable {
  using Params = SparseAttentionParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q), kInput, kRows, "T,Hq,D"},
                                            {ARGUMENT(k), kInput, kRows, kKeys},
                                            {ARGUMENT(v), kInput, kRows, kKeys},
                                            {ARGUMENT(block_ids), kInput, kBlocks, "Hkv,T,K"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(o), kOutput, kWide, "T,Hq,D"},
                                            {ARGUMENT(lse), kExtra, kF32, "T,Hq"}};
};

struct DenseAttentionTable {
  using Params = DenseAttentionParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q), kInput, kRows, "T,Hq,D"},
                                            {ARGUMENT(k), kInput, kRows, kKeys},
                                            {ARGUMENT(v), kInput, kRows, kKeys},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(o), kOutput, kWide, "T,Hq,D"},
                                            {ARGUMENT(lse), kExtra, kF32, "T,Hq"},
                                            {ARGUMENT(block_max), kExtra, kF32, "Hq,T,blocks"}};
};

struct MergeTable {
  using Params = MergeParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(o_parts), kInput, kWide, "parts,T,Hq,D"},
                                            {ARGUMENT(lse_parts), kInput, kF32, "parts,T,Hq"},
                                            {ARGUMENT(o), kOutput, kWide, "T,Hq,D"},
                                            {ARGUMENT(lse), kExtra, kF32, "T,Hq"}};
};

struct MergeListsTable {
  using Params = MergeListsParams;
  static constexpr Argument kArguments[] = {
      {ARGUMENT(scores_parts), kInput, kF32, "parts,Hi,T,K"},
      {ARGUMENT(block_ids_parts), kInput, kI32, "parts,Hi,T,K"},
      {ARGUMENT(block_ids), kOutput, kBlocks, "Hi,T,K"},
      {ARGUMENT(scores), kExtra, kF32, "Hi,T,K"}};
};

struct BlockListsTable {
  using Params = BlockListsParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(block_ids), kInput, kBlocks, "Hkv,T,K"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(row_ptr), kOutput, kI32, "Hkv,NB+1"},
                                            {ARGUMENT(entries), kOutput, kI32, "Hkv,T*K"}};
};

struct AppendPagedTable {
  using Params = AppendPagedParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(k), kOptional, kRows, "T,Hkv,D"},
                                            {ARGUMENT(v), kOptional, kRows, "T,Hkv,D"},
                                            {ARGUMENT(k_idx), kOptional, kRows, "T,Di"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(k_pages), kUpdated, kRows, "P,Hkv,Bk,D"},
                                            {ARGUMENT(v_pages), kUpdated, kRows, "P,Hkv,Bk,D"},
                                            {ARGUMENT(k_idx_pages), kUpdated, kRows, "P,Bk,Di"}};
};

struct BlockMassTable {
  using Params = BlockMassParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q), kInput, kRows, "T,Hq,D"},
                                            {ARGUMENT(k), kInput, kRows, kKeys},
                                            {ARGUMENT(lse), kInput, kF32, "T,Hq"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(mass), kOutput, kF32, "Hkv,T,blocks"}};
};

struct LayerTable {
  using Params = LayerParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q), kInput, kRows, "T,Hq,D"},
                                            {ARGUMENT(q_idx), kInput, kRows, "T,Hi,Di"},
                                            {ARGUMENT(k), kInput, kRows, kKeys},
                                            {ARGUMENT(v), kInput, kRows, kKeys},
                                            {ARGUMENT(k_idx), kInput, kRows, kIndexKeys},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(o), kOutput, kWide, "T,Hq,D"},
                                            {ARGUMENT(lse), kExtra, kF32, "T,Hq"},
                                            {ARGUMENT(block_ids), kExtra, kBlocks, "Hkv,T,K"}};
};

template <bool Listed>
struct AttentionBackwardTable {
  using Params = AttentionBackwardParams;
  static constexpr Argument kArguments[] = {
      {ARGUMENT(q), kInput, kRows, "T,Hq,D"},
      {ARGUMENT(k), kInput, kRows, "S,Hkv,D"},
      {ARGUMENT(v), kInput, kRows, "S,Hkv,D"},
      {ARGUMENT(block_ids), Listed ? kInput : kAbsent, kBlocks, "Hkv,T,K"},
      {ARGUMENT(o), kInput, kWide, "T,Hq,D", "out"},
      {ARGUMENT(lse), kInput, kF32, "T,Hq"},
      {ARGUMENT(d_o), kInput, kWide, "T,Hq,D", "dout"},
      {ARGUMENT(batch), kBatch},
      {ARGUMENT(row_ptr), Listed ? kOptional : kAbsent, kI32, "Hkv,NB+1"},
      {ARGUMENT(entries), Listed ? kOptional : kAbsent, kI32, "Hkv,T*K"},
      {ARGUMENT(dq), kOutput, kWide, "T,Hq,D"},
      {ARGUMENT(dk), kOutput, kWide, "S,Hkv,D"},
      {ARGUMENT(dv), kOutput, kWide, "S,Hkv,D"}};
};

struct IndexLseTable {
  using Params = IndexLseParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q_idx), kInput, kRows, "T,Hi,Di"},
                                            {ARGUMENT(k_idx), kInput, kRows, "S,Di"},
                                            {ARGUMENT(block_ids), kOptional, kBlocks, "Hi,T,K"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(lse), kOutput, kF32, "T,Hi"}};
};

template <Role Gradient, Role Loss>
struct KlTable {
  using Params = KlParams;
  static constexpr Argument kArguments[] = {{ARGUMENT(q), kInput, kRows, "T,Hq,D"},
                                            {ARGUMENT(k), kInput, kRows, "S,Hkv,D"},
                                            {ARGUMENT(lse), kInput, kF32, "T,Hq"},
                                            {ARGUMENT(q_idx), kInput, kRows, "T,Hi,Di"},
                                            {ARGUMENT(k_idx), kInput, kRows, "S,Di"},
                                            {ARGUMENT(index_lse), kInput, kF32, "T,Hi"},
                                            {ARGUMENT(block_ids), kOptional, kBlocks, "Hkv,T,K"},
                                            {ARGUMENT(batch), kBatch},
                                            {ARGUMENT(row_ptr), kOptional, kI32, "Hkv,NB+1"},
                                            {ARGUMENT(entries), kOptional, kI32, "Hkv,T*K"},
                                            {ARGUMENT(dq_idx), Gradient, kWide, "T,Hi,Di"},
                                            {ARGUMENT(dk_idx), Gradient, kWide, "S,Di"},
                                            {ARGUMENT(kl), Loss, kF32, "T,Hi"}};
};
#undef ARGUMENT

// ---- operators ----------------------------------------------------------------------------------

constexpr uint32_t kAttention = kHeadsQ | kHeadsKv | kHeadDim | kBlockSize;
constexpr uint32_t kIndex = kHeadsKv | kIndexDim | kBlockSize;

template <class Params>
constexpr Params kNothing{};

/// What follows from the struct of arguments.
template <class Table>
constexpr OpInfo entry(Op op, const char* name, const char* summary, const char* c_params,
                       uint32_t uses, Status (*check)(const Border&, const ParamsRef&),
                       Cost (*cost)(const Problem&, const CostTerms&)) {
  using Params = typename Table::Params;
  size_t batch = OpInfo::kNone, softmax_scale = OpInfo::kNone;
  if constexpr (requires { &Params::batch; }) batch = offsetof(Params, batch);
  if constexpr (requires { &Params::softmax_scale; })
    softmax_scale = offsetof(Params, softmax_scale);
  const auto has = [](std::string_view letter) {
    return std::any_of(std::begin(Table::kArguments), std::end(Table::kArguments),
                       [&](const Argument& a) { return a.has_letter(letter); });
  };
  return {.op = op,
          .name = name,
          .summary = summary,
          .arguments = Table::kArguments,
          .params = Params::kOps[0],
          .c_params = c_params,
          .defaults = &kNothing<Params>,
          .size = sizeof(Params),
          .batch = batch,
          .softmax_scale = softmax_scale,
          .uses = uses,
          .pages = has("P"),
          .entries = has("T*K"),
          .check = check,
          .cost = cost};
}

/// Few tokens read their own blocks; many of them together read the whole context.
double sparse_rows(const CostTerms& c) {
  return c.tokens <= static_cast<double>(kDecodeTokens) ? c.sparse_pairs : c.keys;
}
double kl_bytes(const CostTerms& c) {
  return c.q + c.lse + c.keys * c.kv_row + c.q_idx + c.k_idx + c.index_lse + c.ids;
}

constexpr OpInfo kOps[] = {
    entry<IndexScoresTable>(
        Op::kIndexScores, "index_scores",
        "scores[r,t,j] = max over visible tokens s of block j of q_idx[t,r] . k_idx[s]",
        "index_scores", kIndex, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.index_pair_flops * c.dense_pairs, c.q_idx + c.k_idx + c.scores};
        }),
    entry<SelectBlocksTable>(
        Op::kSelectBlocks, "select_blocks",
        "ids = forced blocks and best scores, ascending, -1 in the unused tail", "select_blocks",
        kHeadsKv | kBlockSize | kTopk | kForced, check_select_blocks,
        [](const Problem&, const CostTerms& c) -> Cost { return {0, c.scores + c.ids}; }),
    entry<IndexSelectTable>(
        Op::kIndexSelect, "index_select", "index_scores and select_blocks in one pass",
        "index_select", kIndex | kTopk | kForced, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.index_pair_flops * c.dense_pairs, c.q_idx + c.k_idx + c.ids};
        }),
    entry<SparseAttentionTable>(
        Op::kSparseAttention, "sparse_attention",
        "o = softmax(q . k * scale) v over the visible tokens of the listed blocks",
        "sparse_attention", kAttention | kTopk, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.pair_flops * c.sparse_pairs,
                  2 * c.q + c.lse + c.ids + 2 * sparse_rows(c) * c.kv_row};
        }),
    entry<DenseAttentionTable>(
        Op::kDenseAttention, "dense_attention", "the same with every visible block",
        "dense_attention", kAttention, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.pair_flops * c.dense_pairs, 2 * c.q + c.lse + 2 * c.keys * c.kv_row};
        }),
    entry<MergeTable>(
        Op::kMerge, "merge", "combines partial results over disjoint key sets", "merge",
        kHeadsQ | kHeadDim, check_parts,
        [](const Problem&, const CostTerms& c) -> Cost { return {0, 3 * (c.q + c.lse)}; }),
    entry<BlockListsTable>(Op::kBlockLists, "block_lists",
                           "block -> queries, as CSR per KV head; an entry is token*K + slot",
                           "block_lists", kHeadsKv | kBlockSize | kTopk, nullptr,
                           [](const Problem& p, const CostTerms& c) -> Cost {
                             return {0, 2 * c.ids + p.heads_kv * (c.blocks + 1) * 4};
                           }),
    entry<AppendPagedTable>(
        Op::kAppendPaged, "append_paged",
        "writes the new rows into their pages; k with v, and k_idx, are each optional",
        "append_paged", kHeadsKv | kHeadDim | kIndexDim | kBlockSize | kPagedOnly,
        check_append_paged,
        [](const Problem& p, const CostTerms& c) -> Cost {
          return {0, 2 * c.tokens * (2 * c.kv_row + p.index_dim * c.element)};
        }),
    entry<BlockMassTable>(Op::kBlockMass, "block_mass",
                          "attention mass of each block, mean over the heads of a group",
                          "block_mass", kAttention, nullptr,
                          [](const Problem&, const CostTerms& c) -> Cost {
                            return {c.pair_flops / 2 * c.dense_pairs,
                                    c.q + c.lse + c.keys * c.kv_row + c.scores};
                          }),
    entry<LayerTable>(
        Op::kLayer, "msa_layer", "a sparse layer: index_select, then attention over what it chose",
        "layer", kAttention | kIndexDim | kTopk | kForced, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.index_pair_flops * c.dense_pairs + c.pair_flops * c.sparse_pairs,
                  c.q_idx + c.k_idx + 2 * c.q + c.lse + 2 * sparse_rows(c) * c.kv_row};
        }),
    entry<AttentionBackwardTable<true>>(
        Op::kSparseAttentionBackward, "sparse_attention_backward",
        "dq, dk and dv of sparse attention, without ids of dense attention; packed keys",
        "attention_backward", kAttention | kTopk | kPackedOnly, check_inverse_lists,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.pair_flops / 2 * 5 * c.sparse_pairs,
                  4 * c.q + c.lse + c.ids + 4 * c.keys * c.kv_row};
        }),
    entry<AttentionBackwardTable<false>>(
        Op::kDenseAttentionBackward, "dense_attention_backward", "", "attention_backward",
        kAttention | kPackedOnly, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.pair_flops / 2 * 5 * c.dense_pairs, 4 * c.q + c.lse + 4 * c.keys * c.kv_row};
        }),
    entry<IndexLseTable>(
        Op::kIndexLse, "index_lse",
        "LSE of the index logits over the listed blocks, without ids over all; packed keys",
        "index_lse", kIndex | kTopk | kPackedOnly, nullptr,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {c.index_pair_flops * c.sparse_pairs, c.q_idx + c.k_idx + c.ids + c.index_lse};
        }),
    entry<KlTable<kOutput, kExtra>>(
        Op::kKlBackward, "kl_backward",
        "the KL loss of the index branch, or its gradients; packed keys", "kl",
        kAttention | kIndexDim | kTopk | kPackedOnly, check_inverse_lists,
        [](const Problem&, const CostTerms& c) -> Cost {
          return {(c.pair_flops / 2 + 3 * c.index_pair_flops) * c.sparse_pairs,
                  kl_bytes(c) + c.q_idx + c.k_idx};
        }),
    entry<KlTable<kAbsent, kOutput>>(Op::kKlLoss, "kl_loss", "", "kl",
                                     kAttention | kIndexDim | kTopk | kPackedOnly,
                                     check_inverse_lists,
                                     [](const Problem&, const CostTerms& c) -> Cost {
                                       return {
                                           (c.pair_flops / 2 + c.index_pair_flops) * c.sparse_pairs,
                                           kl_bytes(c) + c.index_lse};
                                     }),
    entry<MergeListsTable>(
        Op::kMergeLists, "merge_lists", "the K best blocks of several lists, by score",
        "merge_lists", kHeadsKv | kTopk, check_parts,
        [](const Problem&, const CostTerms& c) -> Cost { return {0, 2 * 3 * c.ids}; }),
};

constexpr OldName kOldNames[] = {{"sparse_decode", Op::kSparseAttention, 4},
                                 {"msa_layer_decode", Op::kLayer, 10}};

}  // namespace

const Argument* OpInfo::find(std::string_view argument) const {
  const auto at = std::find_if(arguments.begin(), arguments.end(),
                               [&](const Argument& a) { return argument == a.name; });
  return at == arguments.end() ? nullptr : &*at;
}

std::span<const OpInfo> all_ops() { return kOps; }

const OpInfo* find_op(Op op) {
  const auto at = std::ranges::lower_bound(kOps, op, {}, &OpInfo::op);
  return at == std::end(kOps) || at->op != op ? nullptr : at;
}

const OpInfo& info_of(Op op) { return *find_op(op); }

std::span<const OldName> old_names() { return kOldNames; }

const OpInfo* find_op(std::string_view name) {
  for (const OldName& old : kOldNames)
    if (name == old.name) return find_op(old.op);
  const auto at = std::ranges::find_if(kOps, [&](const OpInfo& op) { return name == op.name; });
  return at == std::end(kOps) ? nullptr : at;
}

const char* name_of(Op op) {
  const OpInfo* info = find_op(op);
  return info != nullptr ? info->name : "unknown";
}

}  // namespace msa
