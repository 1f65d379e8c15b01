// The arguments of every operator, in the order that Python passes them.
#pragma once

#include <span>

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

/// One array argument. Shapes are letters of problem.h; `paged` is the one with paged keys.
template <class Params>
struct Slot {
  const char* name;  ///< in Python
  const char* core;  ///< in the library and its messages
  Role role;
  Content content;
  const char* packed;
  const char* paged;
  TensorView Params::* view;

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
std::span<const Slot<Params>> slots();

template <>
inline std::span<const Slot<IndexScoresParams>> slots() {
  using P = IndexScoresParams;
  static constexpr Slot<P> table[] = {
      {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", "T,Hi,Di", &P::q_idx},
      {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", "P,Bk,Di", &P::k_idx},
      {"out", "scores", Role::kOutput, kF32, "Hi,T,blocks", "Hi,T,blocks", &P::scores}};
  return table;
}

template <>
inline std::span<const Slot<SelectBlocksParams>> slots() {
  using P = SelectBlocksParams;
  static constexpr Slot<P> table[] = {
      {"scores", "scores", Role::kInput, kF32, "Hi,T,blocks", "Hi,T,blocks", &P::scores},
      {"num_valid_blocks", "num_valid_blocks", Role::kOptional, kI32, "T", "T",
       &P::num_valid_blocks},
      {"out", "ids", Role::kOutput, kI32, "Hi,T,K", "Hi,T,K", &P::ids}};
  return table;
}

template <>
inline std::span<const Slot<IndexSelectParams>> slots() {
  using P = IndexSelectParams;
  static constexpr Slot<P> table[] = {
      {"q_idx", "q_idx", Role::kInput, kRows, "T,Hi,Di", "T,Hi,Di", &P::q_idx},
      {"k_idx", "k_idx", Role::kInput, kRows, "S,Di", "P,Bk,Di", &P::k_idx},
      {"out", "ids", Role::kOutput, kI32, "Hi,T,K", "Hi,T,K", &P::ids},
      {"scores_out", "scores", Role::kExtra, kF32, "Hi,T,K", "Hi,T,K", &P::scores}};
  return table;
}

template <>
inline std::span<const Slot<SparseAttentionParams>> slots() {
  using P = SparseAttentionParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"v", "v", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::v},
      {"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", "Hkv,T,K", &P::ids},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "T,Hq,D", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "T,Hq", &P::lse}};
  return table;
}

template <>
inline std::span<const Slot<DenseAttentionParams>> slots() {
  using P = DenseAttentionParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"v", "v", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::v},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "T,Hq,D", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "T,Hq", &P::lse},
      {"block_max", "block_max", Role::kExtra, kF32, "Hq,T,blocks", "Hq,T,blocks", &P::block_max}};
  return table;
}

template <>
inline std::span<const Slot<MergeParams>> slots() {
  using P = MergeParams;
  static constexpr Slot<P> table[] = {
      {"o_parts", "o_parts", Role::kInput, kRows, "parts,T,Hq,D", "", &P::o_parts},
      {"lse_parts", "lse_parts", Role::kInput, kF32, "parts,T,Hq", "", &P::lse_parts},
      {"out", "o", Role::kOutput, Content::kOutput, "T,Hq,D", "", &P::o},
      {"lse", "lse", Role::kExtra, kF32, "T,Hq", "", &P::lse}};
  return table;
}

template <>
inline std::span<const Slot<BlockListsParams>> slots() {
  using P = BlockListsParams;
  static constexpr Slot<P> table[] = {
      {"block_ids", "ids", Role::kInput, kI32, "Hkv,T,K", "Hkv,T,K", &P::ids},
      {"row_ptr", "row_ptr", Role::kOutput, kI32, "Hkv,NB+1", "Hkv,NB+1", &P::row_ptr},
      {"entries", "entries", Role::kOutput, kI32, "Hkv,T*K", "Hkv,T*K", &P::entries}};
  return table;
}

template <>
inline std::span<const Slot<AppendPagedParams>> slots() {
  using P = AppendPagedParams;
  static constexpr Slot<P> table[] = {
      {"k", "k", Role::kOptional, kRows, "", "T,Hkv,D", &P::k},
      {"v", "v", Role::kOptional, kRows, "", "T,Hkv,D", &P::v},
      {"k_idx", "k_idx", Role::kOptional, kRows, "", "T,Di", &P::k_idx},
      {"k_pages", "k_pages", Role::kUpdated, kRows, "", "P,Hkv,Bk,D", &P::k_pages},
      {"v_pages", "v_pages", Role::kUpdated, kRows, "", "P,Hkv,Bk,D", &P::v_pages},
      {"k_idx_pages", "k_idx_pages", Role::kUpdated, kRows, "", "P,Bk,Di", &P::k_idx_pages}};
  return table;
}

template <>
inline std::span<const Slot<BlockMassParams>> slots() {
  using P = BlockMassParams;
  static constexpr Slot<P> table[] = {
      {"q", "q", Role::kInput, kRows, "T,Hq,D", "T,Hq,D", &P::q},
      {"k", "k", Role::kInput, kRows, "S,Hkv,D", "P,Hkv,Bk,D", &P::k},
      {"lse", "lse", Role::kInput, kF32, "T,Hq", "T,Hq", &P::lse},
      {"out", "mass", Role::kOutput, kF32, "Hkv,T,blocks", "Hkv,T,blocks", &P::mass}};
  return table;
}

}  // namespace msa::python
