// The arguments of every operator, in the order that Python passes them.
#pragma once

#include <array>
#include <string_view>

#include "msa/ops.h"
#include "tensors.h"

namespace msa::python {

enum class Role {
  kInput,
  kOptional,  ///< an input that may be missing
  kOutput,    ///< None: made by the call
  kExtra,     ///< an output only on request; True: made by the call
  kUpdated,   ///< memory of the caller that is written in part; may be missing
};

/// One array argument. Shapes are letters of problem.h; behind a bar, those with paged keys.
template <class Params>
struct Slot {
  const char* name;  ///< in Python
  const char* core;  ///< in the library and its messages
  Role role;
  Content content;
  std::string_view shape;
  TensorView Params::* view;

  std::string_view letters(bool paged) const {
    const size_t bar = shape.find('|');
    return bar == shape.npos ? shape : paged ? shape.substr(bar + 1) : shape.substr(0, bar);
  }
  bool written() const { return role != Role::kInput && role != Role::kOptional; }
};

struct BatchSlot {
  const char* name;
  TensorView Batch::* view;
};
inline constexpr BatchSlot kBatch[] = {
    {"cu_seqlens_q", &Batch::cu_seqlens_q}, {"cu_seqlens_k", &Batch::cu_seqlens_k},
    {"seq_lens", &Batch::seq_lens},         {"page_table", &Batch::page_table},
    {"q_offset", &Batch::q_offset},         {"block_offset", &Batch::block_offset}};

inline constexpr Content kRows = Content::kRows, kF32 = Content::kF32, kI32 = Content::kI32;

template <class Params>
inline constexpr int kSlots = 0;  // one array of slots per operator:

template <>
inline constexpr auto kSlots<IndexScoresParams> = std::to_array<Slot<IndexScoresParams>>(
    {{"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", &IndexScoresParams::q_idx},
     {"k_idx", "k_idx", Role::kInput, kRows, "S,Di|P,Bk,Di", &IndexScoresParams::k_idx},
     {"out", "scores", Role::kOutput, kF32, "Hi,T,blocks", &IndexScoresParams::scores}});

template <>
inline constexpr auto kSlots<SelectBlocksParams> = std::to_array<Slot<SelectBlocksParams>>(
    {{"scores", "scores", Role::kInput, kF32, "Hi,T,blocks", &SelectBlocksParams::scores},
     {"num_valid_blocks", "num_valid_blocks", Role::kOptional, kI32, "T",
      &SelectBlocksParams::num_valid_blocks},
     {"out", "ids", Role::kOutput, kI32, "Hi,T,K", &SelectBlocksParams::ids}});

template <>
inline constexpr auto kSlots<IndexSelectParams> = std::to_array<Slot<IndexSelectParams>>(
    {{"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", &IndexSelectParams::q_idx},
     {"k_idx", "k_idx", Role::kInput, kRows, "S,Di|P,Bk,Di", &IndexSelectParams::k_idx},
     {"out", "ids", Role::kOutput, kI32, "Hi,T,K", &IndexSelectParams::ids},
     {"scores_out", "scores", Role::kExtra, kF32, "Hi,T,K", &IndexSelectParams::scores}});

template <>
inline constexpr auto kSlots<SparseAttentionParams> = std::to_array<Slot<SparseAttentionParams>>(
    {{"q", "q", Role::kInput, kRows, "T,Hq,D", &SparseAttentionParams::q},
     {"k", "k", Role::kInput, kRows, "S,Hkv,D|P,Hkv,Bk,D", &SparseAttentionParams::k},
     {"v", "v", Role::kInput, kRows, "S,Hkv,D|P,Hkv,Bk,D", &SparseAttentionParams::v},
     {"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", &SparseAttentionParams::ids},
     {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", &SparseAttentionParams::o},
     {"lse", "lse", Role::kExtra, kF32, "T,Hq", &SparseAttentionParams::lse}});

template <>
inline constexpr auto kSlots<DenseAttentionParams> = std::to_array<Slot<DenseAttentionParams>>(
    {{"q", "q", Role::kInput, kRows, "T,Hq,D", &DenseAttentionParams::q},
     {"k", "k", Role::kInput, kRows, "S,Hkv,D|P,Hkv,Bk,D", &DenseAttentionParams::k},
     {"v", "v", Role::kInput, kRows, "S,Hkv,D|P,Hkv,Bk,D", &DenseAttentionParams::v},
     {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", &DenseAttentionParams::o},
     {"lse", "lse", Role::kExtra, kF32, "T,Hq", &DenseAttentionParams::lse},
     {"block_max", "block_max", Role::kExtra, kF32, "Hq,T,blocks",
      &DenseAttentionParams::block_max}});

template <>
inline constexpr auto kSlots<MergeParams> = std::to_array<Slot<MergeParams>>(
    {{"o_parts", "o_parts", Role::kInput, kRows, "parts,T,Hq,D", &MergeParams::o_parts},
     {"lse_parts", "lse_parts", Role::kInput, kF32, "parts,T,Hq", &MergeParams::lse_parts},
     {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", &MergeParams::o},
     {"lse", "lse", Role::kExtra, kF32, "T,Hq", &MergeParams::lse}});

template <>
inline constexpr auto kSlots<BlockListsParams> = std::to_array<Slot<BlockListsParams>>(
    {{"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", &BlockListsParams::ids},
     {"row_ptr", "row_ptr", Role::kOutput, kI32, "Hkv,NB+1", &BlockListsParams::row_ptr},
     {"entries", "entries", Role::kOutput, kI32, "Hkv,T*K", &BlockListsParams::entries}});

template <>
inline constexpr auto kSlots<AppendPagedParams> = std::to_array<Slot<AppendPagedParams>>(
    {{"k", "k", Role::kOptional, kRows, "T,Hkv,D", &AppendPagedParams::k},
     {"v", "v", Role::kOptional, kRows, "T,Hkv,D", &AppendPagedParams::v},
     {"k_idx", "k_idx", Role::kOptional, kRows, "T,Di", &AppendPagedParams::k_idx},
     {"k_pages", "k_pages", Role::kUpdated, kRows, "P,Hkv,Bk,D", &AppendPagedParams::k_pages},
     {"v_pages", "v_pages", Role::kUpdated, kRows, "P,Hkv,Bk,D", &AppendPagedParams::v_pages},
     {"k_idx_pages", "k_idx_pages", Role::kUpdated, kRows, "P,Bk,Di",
      &AppendPagedParams::k_idx_pages}});

template <>
inline constexpr auto kSlots<BlockMassParams> = std::to_array<Slot<BlockMassParams>>(
    {{"q", "q", Role::kInput, kRows, "T,Hq,D", &BlockMassParams::q},
     {"k", "k", Role::kInput, kRows, "S,Hkv,D|P,Hkv,Bk,D", &BlockMassParams::k},
     {"lse", "lse", Role::kInput, kF32, "T,Hq", &BlockMassParams::lse},
     {"out", "mass", Role::kOutput, kF32, "Hkv,T,blocks", &BlockMassParams::mass}});

template <>
inline constexpr auto kSlots<LayerDecodeParams> = std::to_array<Slot<LayerDecodeParams>>(
    {{"q", "q", Role::kInput, kRows, "T,Hq,D", &LayerDecodeParams::q},
     {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", &LayerDecodeParams::q_idx},
     {"k_pages", "k", Role::kInput, kRows, "P,Hkv,Bk,D", &LayerDecodeParams::k},
     {"v_pages", "v", Role::kInput, kRows, "P,Hkv,Bk,D", &LayerDecodeParams::v},
     {"k_idx_pages", "k_idx", Role::kInput, kRows, "P,Bk,Di", &LayerDecodeParams::k_idx},
     {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", &LayerDecodeParams::o},
     {"lse", "lse", Role::kExtra, kF32, "T,Hq", &LayerDecodeParams::lse},
     {"ids_out", "ids", Role::kExtra, kI32, "Hkv,T,K", &LayerDecodeParams::ids}});

template <>
inline constexpr auto kSlots<AttentionBackwardParams> =
    std::to_array<Slot<AttentionBackwardParams>>(
        {{"q", "q", Role::kInput, kRows, "T,Hq,D", &AttentionBackwardParams::q},
         {"k", "k", Role::kInput, kRows, "S,Hkv,D", &AttentionBackwardParams::k},
         {"v", "v", Role::kInput, kRows, "S,Hkv,D", &AttentionBackwardParams::v},
         {"block_ids", "ids", Role::kOptional, kI32, "Hkv,T,K", &AttentionBackwardParams::ids},
         {"out", "o", Role::kInput, Content::kOutput, "T,Hq,D", &AttentionBackwardParams::o},
         {"lse", "lse", Role::kInput, kF32, "T,Hq", &AttentionBackwardParams::lse},
         {"dout", "d_o", Role::kInput, Content::kOutput, "T,Hq,D", &AttentionBackwardParams::d_o},
         {"row_ptr", "row_ptr", Role::kOptional, kI32, "Hkv,NB+1",
          &AttentionBackwardParams::row_ptr},
         {"entries", "entries", Role::kOptional, kI32, "Hkv,T*K",
          &AttentionBackwardParams::entries},
         {"dq", "dq", Role::kOutput, Content::kOutput, "T,Hq,D", &AttentionBackwardParams::dq},
         {"dk", "dk", Role::kOutput, Content::kOutput, "S,Hkv,D", &AttentionBackwardParams::dk},
         {"dv", "dv", Role::kOutput, Content::kOutput, "S,Hkv,D", &AttentionBackwardParams::dv}});

template <>
inline constexpr auto kSlots<IndexLseParams> = std::to_array<Slot<IndexLseParams>>(
    {{"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", &IndexLseParams::q_idx},
     {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", &IndexLseParams::k_idx},
     {"block_ids", "ids", Role::kOptional, kI32, "Hi,T,K", &IndexLseParams::ids},
     {"out", "lse", Role::kOutput, kF32, "T,Hi", &IndexLseParams::lse}});

template <>
inline constexpr auto kSlots<KlParams> = std::to_array<Slot<KlParams>>(
    {{"q", "q", Role::kInput, kRows, "T,Hq,D", &KlParams::q},
     {"k", "k", Role::kInput, kRows, "S,Hkv,D", &KlParams::k},
     {"lse", "lse", Role::kInput, kF32, "T,Hq", &KlParams::lse},
     {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", &KlParams::q_idx},
     {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", &KlParams::k_idx},
     {"index_lse", "index_lse", Role::kInput, kF32, "T,Hi", &KlParams::index_lse},
     {"block_ids", "ids", Role::kOptional, kI32, "Hkv,T,K", &KlParams::ids},
     {"row_ptr", "row_ptr", Role::kOptional, kI32, "Hkv,NB+1", &KlParams::row_ptr},
     {"entries", "entries", Role::kOptional, kI32, "Hkv,T*K", &KlParams::entries},
     {"dq_idx", "dq_idx", Role::kExtra, Content::kOutput, "T,Hi,Di", &KlParams::dq_idx},
     {"dk_idx", "dk_idx", Role::kExtra, Content::kOutput, "S,Di", &KlParams::dk_idx},
     {"kl", "kl", Role::kExtra, kF32, "T,Hi", &KlParams::kl}});

}  // namespace msa::python
