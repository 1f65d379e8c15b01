// The operators as data: the arguments of each one and what must hold of them. Whatever walks over
// operators reads this table: the checks, the C and the Python interface, the fuzzers, the tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "msa/backend.h"

namespace msa {

class Border;

enum class Role : uint8_t {
  kInput,
  kOptional,  ///< an input that may be missing
  kOutput,
  kExtra,    ///< an output on request
  kUpdated,  ///< memory of the caller that is written in part; with the input that it takes
  kAbsent,   ///< of another operator with the same arguments; must be missing
  kBatch,    ///< no tensor: the place of `batch`
};

enum class Content : uint8_t {
  kRows,    ///< the problem's dtype
  kWide,    ///< the problem's dtype, or f32
  kF32,     ///< scores, LSEs
  kI32,     ///< counts
  kBlocks,  ///< i32 lists of block ids
};

/// f("T"), f("Hq"), f("D") for "T,Hq,D".
template <class F>
constexpr void for_each_letter(std::string_view letters, const F& f) {
  while (!letters.empty()) {
    const size_t end = letters.find(',') == letters.npos ? letters.size() : letters.find(',');
    f(letters.substr(0, end));
    letters.remove_prefix(end == letters.size() ? end : end + 1);
  }
}

/// One argument. Shapes are letters of problem.h; behind a bar, those with paged keys.
struct Argument {
  const char* name;
  size_t offset;  ///< of the TensorView, in bytes
  Role role;
  Content content = Content::kRows;
  std::string_view shape{};
  const char* python = nullptr;  ///< its name there, where that is another one
  bool any_strides = false;      ///< the innermost one as well

  constexpr std::string_view letters(bool paged) const {
    const size_t bar = shape.find('|');
    return bar == shape.npos ? shape : paged ? shape.substr(bar + 1) : shape.substr(0, bar);
  }
  /// In either layout.
  constexpr bool has_letter(std::string_view letter) const {
    bool found = false;
    for (bool paged : {false, true})
      for_each_letter(letters(paged), [&](std::string_view l) { found = found || l == letter; });
    return found;
  }
  bool is_tensor() const { return role != Role::kBatch; }
  bool is_written() const {
    return role == Role::kOutput || role == Role::kExtra || role == Role::kUpdated;
  }
  const TensorView& in(const void* params) const {
    return *reinterpret_cast<const TensorView*>(static_cast<const std::byte*>(params) + offset);
  }
  TensorView& in(void* params) const {
    return *reinterpret_cast<TensorView*>(static_cast<std::byte*>(params) + offset);
  }
};

/// Fields of a Problem; those that an operator does not use are ignored.
enum Uses : uint32_t {
  kHeadsQ = 1,
  kHeadsKv = 2,
  kHeadDim = 4,
  kIndexDim = 8,
  kBlockSize = 16,
  kTopk = 32,
  kForced = 64,  ///< init_blocks and local_blocks
  kPackedOnly = 128,
  kPagedOnly = 256,
};

/// Sizes of one sequence that costs are made of; bytes unless said otherwise.
struct CostTerms {
  double tokens, keys;                  ///< new tokens, all tokens
  double dense_pairs, sparse_pairs;     ///< visible (query, key) pairs; those in K blocks
  double pair_flops, index_pair_flops;  ///< of a pair: q . k and p v of all heads; q_idx . k_idx
  double q, lse, kv_row;                ///< queries, LSEs; K or V of one token
  double q_idx, k_idx, index_lse;       ///< of the index branch
  double ids, scores;                   ///< block lists; a score per block
  double blocks;                        ///< ceil(kv_len / Bk)
  double element;                       ///< of the problem's dtype
};

struct OpInfo {
  Op op;
  const char* name;
  const char* summary;  ///< one line for the C header
  std::span<const Argument> arguments;
  Op params;             ///< first of the operators that share the struct of arguments
  const char* c_params;  ///< name of that struct in C, without msa_ and _params
  const void* defaults;  ///< a struct of arguments of which none is given
  size_t size;           ///< of the struct
  size_t batch;          ///< offset of the Batch in it, or kNone
  size_t softmax_scale;  ///< offset of the float, or kNone
  uint32_t uses;
  bool pages;    ///< an argument has pages
  bool entries;  ///< an argument counts T*K entries: (token, slot)
  /// What no table says; null: nothing. All arguments passed their own checks.
  Status (*check)(const Border&, const ParamsRef&);
  Cost (*cost)(const Problem&, const CostTerms&);

  static constexpr size_t kNone = SIZE_MAX;

  const Argument* find(std::string_view argument) const;
  bool has_batch() const { return batch != kNone; }
  /// Precondition: has_batch().
  const Batch& batch_in(const void* params) const {
    return *reinterpret_cast<const Batch*>(static_cast<const std::byte*>(params) + batch);
  }
  Batch& batch_in(void* params) const {
    return *reinterpret_cast<Batch*>(static_cast<std::byte*>(params) + batch);
  }
};

/// Room for the struct of arguments of any operator.
struct ParamsStorage {
  alignas(std::max_align_t) std::byte memory[4096];
};
template <class... Params>
constexpr bool all_fit(ParamsList<Params...>) {
  return ((sizeof(Params) <= sizeof(ParamsStorage)) && ...);
}
static_assert(all_fit(AllParams{}));

/// One entry per operator, in the order of their codes.
std::span<const OpInfo> all_ops();
/// Precondition: a code of the enum.
const OpInfo& info_of(Op op);
/// Null: no operator.
const OpInfo* find_op(Op op);

/// What an operator may be called beside its name, until 0.3.
struct OldName {
  const char* name;
  Op op;
  int code;  ///< in C
};
std::span<const OldName> old_names();
/// The operator of that name, or of that old one. Null: there is none.
const OpInfo* find_op(std::string_view name);

}  // namespace msa
