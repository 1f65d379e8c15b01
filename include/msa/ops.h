// The operators, and a plain struct of arguments for each. Shapes use the letters of problem.h.
//
// Common rules
//   dtypes    q, k, v, k_idx, q_idx share one of f32, bf16, f16; metadata and ids are i32;
//             scores, maxima, masses and LSEs are f32; o has the dtype of q, or f32.
//   position  query i of sequence b stands at pos = q_offset[b] + i when q_offset is given, else at
//             pos = block_offset[b]*Bk + kv_len[b] - q_len[b] + i (bottom-right causal).
//   blocks    are anchored at position 0: block j holds tokens j*Bk .. (j+1)*Bk - 1, cut at kv_len.
//   shards    with block_offset the given keys are tokens block_offset[b]*Bk + 0 .. kv_len[b]-1;
//             block ids stay global, and ids of other shards are skipped. The partial results
//             combine exactly by `merge` (values) and by the K best scores (ids).
//   local     the block that ends a query's forced ones: with a causal mask that of its position,
//             by global id, so maybe one of another shard; without a mask the last of the given
//             keys, in every shard its own. select_blocks takes the last valid one.
//   padding   a sequence with kv_len 0 and rows past cu_seqlens_q[B] give zeros, LSE -inf, ids -1;
//             gradients of keys past cu_seqlens_k[B] are zero.
//   lists     name a block at most once. A second time is an error where ids lie in host memory; in
//             device memory it counts nothing, as if the list were the set of its ids.
//   unseen    a key or value that a query may not see (later, unlisted, past kv_len, of another
//             sequence) leaves its row of o, lse, mass, scores and ids alone, NaN and infinities
//             too. Gradients and kl may be NaN anywhere in a sequence that holds a NaN or an
//             infinity, and never in another one.
//   logits    may be as large as 2^126. From 2^30 on, in units of log2, two products of f32 lie 64
//             and more apart: the largest of a row weighs 1, its equals too, all others nothing.
//   given LSE of block_mass, the gradients and kl: P = exp(logit - lse). From |lse| = 2^24 on, f32
//             does not hold the logarithm of the sum: P = exp(min(0, logit - lse + 2^-21 |lse|)),
//             so that every logit it may stand for has P = 1.
// Bad contents of metadata and ids that lie in host memory are errors, by name and index.
#pragma once

#include <cstdint>

#include "msa/export.h"
#include "msa/tensor.h"

namespace msa {

/// The operators, from kSparseAttentionBackward to kKlLoss those of training. In the C interface 4
/// means kSparseAttention too, until 0.3.
enum class Op : int32_t {
  kIndexScores = 0,
  kSelectBlocks = 1,
  kIndexSelect = 2,
  kSparseAttention = 3,
  kDenseAttention = 5,
  kMerge = 6,
  kBlockLists = 7,
  kAppendPaged = 8,
  kBlockMass = 9,
  kLayer = 10,  ///< index_select, then sparse_attention over what it chose, as one call
  kSparseAttentionBackward = 11,
  kDenseAttentionBackward = 12,
  kIndexLse = 13,
  kKlBackward = 14,
  kKlLoss = 15,
  kMergeLists = 16,
};
constexpr bool is_training(Op op) {
  return op >= Op::kSparseAttentionBackward && op <= Op::kKlLoss;
}

/// "index_scores", ... ; "unknown" for codes outside the enum.
MSA_API const char* name_of(Op op);

/// Which rows belong to which sequence.
struct Batch {
  TensorView cu_seqlens_q{};  ///< i32 [B+1], ascending from 0: row range of each sequence's queries
  TensorView cu_seqlens_k{};  ///< i32 [B+1], packed keys: row range of each sequence's keys
  TensorView seq_lens{};      ///< i32 [B], paged keys: cached tokens, the new ones included
  /// Page of logical block j of sequence b: i32 [B,max_pages] in any strides; with page_rows also
  /// i32 [rows,max_pages], of which the batch uses some, or a flat list [entries].
  TensorView page_table{};
  TensorView page_rows{};     ///< i32 [B], optional: b's row of page_table, or its first entry
  TensorView q_offset{};      ///< i32 [B], optional: position of the first query
  TensorView block_offset{};  ///< i32 [B], optional: first block of this shard of the keys
  bool causal = true;         ///< false: every key up to kv_len is visible to every query
};

/// scores[r,t,j] = max over visible tokens s of block j of q_idx[t,r] . k_idx[s]; no scale.
/// -inf where no token is visible; a NaN product counts as -inf; tokens past kv_len never enter.
/// Columns are the blocks of the given keys, counted from block_offset. Source: spec of MSA's index
/// branch, paper section "index branch", eq. of the block score (max pooling).
struct IndexScoresParams {
  static constexpr Op kOps[] = {Op::kIndexScores};
  TensorView q_idx{};  ///< [T,Hi,Di]
  TensorView k_idx{};  ///< [S,Di] or pages [P,Bk,Di]
  Batch batch{};
  TensorView scores{};  ///< out f32 [Hi,T,blocks], any strides, blocks >= ceil(max kv_len / Bk)
};

/// block_ids[r,t,:] = the forced blocks and the best-scored of the first num_valid_blocks[t] ones,
/// ascending, -1 in the unused tail; exactly min(K, num_valid_blocks[t]) ids. Ties go to the lower
/// id; NaN = -inf. Forced blocks count among the K: the last local_blocks valid ones, and those
/// with ids below init_blocks.
struct SelectBlocksParams {
  static constexpr Op kOps[] = {Op::kSelectBlocks};
  TensorView scores{};            ///< f32 [Hi,T,blocks], any strides
  TensorView num_valid_blocks{};  ///< i32 [T], optional (default: all columns)
  TensorView block_ids{};         ///< out i32 [Hi,T,K]
};

/// index_scores and select_blocks in one pass; no score matrix exists. Forced are the local_blocks
/// blocks that end at the local one, and those with global ids below init_blocks, as far as given.
struct IndexSelectParams {
  static constexpr Op kOps[] = {Op::kIndexSelect};
  TensorView q_idx{};  ///< [T,Hi,Di]
  TensorView k_idx{};  ///< [S,Di] or pages [P,Bk,Di]
  Batch batch{};
  TensorView block_ids{};  ///< out i32 [Hi,T,K], ascending, -1 tail
  TensorView
      scores{};  ///< out f32 [Hi,T,K], optional: score of each id; +inf if forced, -inf in the tail
};

/// o = softmax(q . k * scale) v over the visible tokens of the listed blocks, fp32 softmax and
/// sums. Ids may come in any order; -1 ends a list; the head stride of ids may be 0. Plans of
/// decoding steps (problem.h) have kernels of their own. Source: paper section "sparse attention".
struct SparseAttentionParams {
  static constexpr Op kOps[] = {Op::kSparseAttention};
  TensorView q{};          ///< [T,Hq,D]
  TensorView k{};          ///< [S,Hkv,D] or pages [P,Hkv,Bk,D]
  TensorView v{};          ///< as k
  TensorView block_ids{};  ///< i32 [Hkv,T,K]
  Batch batch{};
  float softmax_scale = 0;  ///< 0 = 1/sqrt(D)
  TensorView o{};           ///< out [T,Hq,D]
  TensorView lse{};  ///< out f32 [T,Hq], optional: ln(sum exp(scaled logits)); -inf if none visible
};

/// The same with every visible block.
struct DenseAttentionParams {
  static constexpr Op kOps[] = {Op::kDenseAttention};
  TensorView q{};  ///< [T,Hq,D]
  TensorView k{};  ///< [S,Hkv,D] or pages [P,Hkv,Bk,D]
  TensorView v{};  ///< as k
  Batch batch{};
  float softmax_scale = 0;  ///< 0 = 1/sqrt(D)
  TensorView o{};           ///< out [T,Hq,D]
  TensorView lse{};         ///< out f32 [T,Hq], optional
  TensorView block_max{};   ///< out f32 [Hq,T,blocks], optional: unscaled maxima, as index_scores
};

/// Combines attention over disjoint key sets: a = max_i lse_i; lse = a + ln sum exp(lse_i - a);
/// o = sum exp(lse_i - a) o_i / sum exp(lse_i - a). Parts with lse -inf count nothing; all -inf
/// gives o 0, lse -inf. Parts of equal LSE weigh the same; one of LSE NaN makes o and lse NaN.
struct MergeParams {
  static constexpr Op kOps[] = {Op::kMerge};
  TensorView o_parts{};    ///< [parts,T,Hq,D]
  TensorView lse_parts{};  ///< f32 [parts,T,Hq]
  TensorView o{};          ///< out [T,Hq,D]
  TensorView lse{};        ///< out f32 [T,Hq], optional
};

/// The K best of several lists of K blocks, each chosen of a shard of the keys: what index_select
/// would choose of all of them. The best scores, ties to the lower id, NaN = -inf; forced blocks
/// have +inf, as index_select writes it. A negative id is padding, whatever its score. The parts
/// name distinct blocks. Source: exact merging of selections, as `merge` does it for values.
struct MergeListsParams {
  static constexpr Op kOps[] = {Op::kMergeLists};
  TensorView scores_parts{};     ///< f32 [parts,Hi,T,K]
  TensorView block_ids_parts{};  ///< i32 [parts,Hi,T,K], each list in any order
  TensorView block_ids{};        ///< out i32 [Hi,T,K], ascending, -1 tail
  TensorView scores{};           ///< out f32 [Hi,T,K], optional: score of each id, -inf in the tail
};

/// The inverse of block lists, block -> queries, as CSR per KV head. Blocks of the sequences follow
/// each other: NB = sum over sequences of ceil(kv_len/Bk). An entry is token*K + slot, ascending
/// per block; a block's first slot in a list, where it stands twice.
struct BlockListsParams {
  static constexpr Op kOps[] = {Op::kBlockLists};
  TensorView block_ids{};  ///< i32 [Hkv,T,K]
  Batch batch{};           ///< lengths only
  TensorView row_ptr{};    ///< out i32 [Hkv,NB+1]
  TensorView entries{};    ///< out i32 [Hkv,T*K]; behind row_ptr[h,NB] unused entries are -1
};

/// Writes the T new rows (the last q_len positions of each sequence) into their pages.
/// k and v go together; k_idx is optional, and so are k and v when k_idx is given.
struct AppendPagedParams {
  static constexpr Op kOps[] = {Op::kAppendPaged};
  TensorView k{};            ///< [T,Hkv,D]
  TensorView v{};            ///< [T,Hkv,D]
  TensorView k_idx{};        ///< [T,Di]
  Batch batch{};             ///< cu_seqlens_q, seq_lens, page_table
  TensorView k_pages{};      ///< out [P,Hkv,Bk,D]
  TensorView v_pages{};      ///< out [P,Hkv,Bk,D]
  TensorView k_idx_pages{};  ///< out [P,Bk,Di]
};

/// mass[r,t,j] = mean over the G heads of KV head r of sum over visible tokens s of block j of
/// exp(q . k * scale - lse): the attention mass of each block (oracle, recall, kept mass).
struct BlockMassParams {
  static constexpr Op kOps[] = {Op::kBlockMass};
  TensorView q{};    ///< [T,Hq,D]
  TensorView k{};    ///< [S,Hkv,D] or pages [P,Hkv,Bk,D]
  TensorView lse{};  ///< f32 [T,Hq], of the dense attention
  Batch batch{};
  float softmax_scale = 0;  ///< 0 = 1/sqrt(D)
  TensorView mass{};        ///< out f32 [Hkv,T,blocks], 0 where nothing is visible
};

/// A sparse layer (msa_layer): index_select, then sparse_attention over the blocks it chose. Same
/// ids and values as the two calls; a backend may join them. Source: arXiv 2606.13392.
struct LayerParams {
  static constexpr Op kOps[] = {Op::kLayer};
  TensorView q{};      ///< [T,Hq,D]
  TensorView q_idx{};  ///< [T,Hi,Di]
  TensorView k{};      ///< [S,Hkv,D] or pages [P,Hkv,Bk,D], the new tokens already in them
  TensorView v{};      ///< as k
  TensorView k_idx{};  ///< [S,Di] or pages [P,Bk,Di]
  Batch batch{};
  float softmax_scale = 0;  ///< 0 = 1/sqrt(D)
  TensorView o{};           ///< out [T,Hq,D]
  TensorView lse{};         ///< out f32 [T,Hq], optional
  TensorView block_ids{};   ///< out i32 [Hkv,T,K], optional
};

/// Gradients of sparse_attention and, without ids, of dense_attention (sparse_attention_backward,
/// dense_attention_backward). With P = exp(q . k * scale - lse) over the tokens of the forward pass
/// and dS = P * (d_o . v - o . d_o) * scale:
///   dq[t,h] = sum_s dS k[s];  dk[s] = sum_t,h dS q[t,h];  dv[s] = sum_t,h P d_o[t,h].
/// Rows with lse -inf add nothing. Source: FlashAttention, arXiv 2205.14135, backward pass.
struct AttentionBackwardParams {
  static constexpr Op kOps[] = {Op::kSparseAttentionBackward, Op::kDenseAttentionBackward};
  TensorView q{};          ///< [T,Hq,D]
  TensorView k{};          ///< [S,Hkv,D]; training takes packed keys only
  TensorView v{};          ///< as k
  TensorView block_ids{};  ///< i32 [Hkv,T,K], as in the forward pass; none for dense
  TensorView o{};          ///< [T,Hq,D] of the forward pass, in the dtype of q or f32
  TensorView lse{};        ///< f32 [T,Hq], likewise
  TensorView d_o{};        ///< [T,Hq,D] gradient of o, in the dtype of q or f32
  Batch batch{};
  float softmax_scale = 0;  ///< 0 = 1/sqrt(D)
  TensorView row_ptr{};  ///< i32 [Hkv,NB+1], optional, with entries: what block_lists makes of ids;
  TensorView entries{};  ///< i32 [Hkv,T*K]      without them they are made in the workspace
  TensorView dq{};       ///< out [T,Hq,D], in the dtype of q or f32
  TensorView dk{};       ///< out [S,Hkv,D], likewise
  TensorView dv{};       ///< out [S,Hkv,D], likewise
};

/// lse[t,r] = ln(sum exp(q_idx[t,r] . k_idx[s] / sqrt(Di))) over the visible tokens s of the listed
/// blocks, without ids of all; -inf if none is visible.
struct IndexLseParams {
  static constexpr Op kOps[] = {Op::kIndexLse};
  TensorView q_idx{};      ///< [T,Hi,Di]
  TensorView k_idx{};      ///< [S,Di]
  TensorView block_ids{};  ///< i32 [Hi,T,K], optional
  Batch batch{};
  TensorView lse{};  ///< out f32 [T,Hi]
};

/// The KL loss of the index branch (kl_loss), and its gradients (kl_backward). Over the visible
/// tokens s of the listed blocks, without ids of all,
///   teacher P[s] = mean over the G heads of exp(q . k[s] * scale - lse),
///   student Pi[s] = exp(q_idx . k_idx[s] / sqrt(Di) - index_lse),
///   kl[t,r] = sum_s P (ln P - ln Pi);  dS = (Pi - P) / (queries * Hkv) / sqrt(Di);
///   dq_idx[t,r] = sum_s dS k_idx[s];  dk_idx[s] = sum_t,r dS q_idx[t,r].
/// The loss is the mean of kl over the queries = cu_seqlens_q[B] rows and the Hkv groups; lambda is
/// the caller's factor. Source: arXiv 2606.13392, training of the index branch.
struct KlParams {
  static constexpr Op kOps[] = {Op::kKlBackward, Op::kKlLoss};
  TensorView q{};          ///< [T,Hq,D]
  TensorView k{};          ///< [S,Hkv,D]
  TensorView lse{};        ///< f32 [T,Hq], of attention over the same tokens
  TensorView q_idx{};      ///< [T,Hi,Di]
  TensorView k_idx{};      ///< [S,Di]
  TensorView index_lse{};  ///< f32 [T,Hi], of index_lse over the same tokens
  TensorView block_ids{};  ///< i32 [Hkv,T,K], optional
  Batch batch{};
  float softmax_scale = 0;  ///< of the teacher; 0 = 1/sqrt(D)
  TensorView row_ptr{};     ///< i32 [Hkv,NB+1], optional, as in AttentionBackwardParams
  TensorView entries{};     ///< i32 [Hkv,T*K]
  TensorView dq_idx{};      ///< out [T,Hi,Di], in the dtype of q_idx or f32; kl_backward only
  TensorView dk_idx{};      ///< out [S,Di], likewise
  TensorView kl{};          ///< out f32 [T,Hi], 0 if nothing is visible; optional for kl_backward
};

/// Every struct of arguments.
template <class... Params>
struct ParamsList {};
using AllParams = ParamsList<IndexScoresParams, SelectBlocksParams, IndexSelectParams,
                             SparseAttentionParams, DenseAttentionParams, MergeParams,
                             BlockListsParams, AppendPagedParams, BlockMassParams, LayerParams,
                             AttentionBackwardParams, IndexLseParams, KlParams, MergeListsParams>;

/// The arguments of one call, whatever the operator, by reference.
class ParamsRef {
 public:
  template <class Params>
    requires requires { Params::kOps[0]; }
  ParamsRef(const Params& params) : op_(Params::kOps[0]), data_(&params) {}  // NOLINT
  /// `data`: the struct of arguments whose first operator is `op`.
  ParamsRef(Op op, const void* data) : op_(op), data_(data) {}

  Op op() const { return op_; }  ///< the first operator with such arguments
  const void* data() const { return data_; }
  /// Precondition: the arguments are of this type.
  template <class Params>
  const Params& as() const {
    return *static_cast<const Params*>(data_);
  }

 private:
  Op op_;
  const void* data_;
};

}  // namespace msa
