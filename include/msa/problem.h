// What is to be computed (Problem), how large it may get (Limits), and what it costs (Cost).
//
// Shape letters, used everywhere:
//   B  sequences in the batch            T  query tokens, packed over the batch
//   S  key tokens, packed over the batch P  pages of a paged cache
//   Hq query heads, Hkv KV heads, G = Hq / Hkv (query head h belongs to KV head h / G)
//   Hi index query heads, always = Hkv   D, Di head dims of the main and the index branch
//   Bk block size in tokens              K  selected blocks per (token, KV head)
#pragma once

#include <cstdint>

#include "msa/export.h"
#include "msa/ops.h"
#include "msa/status.h"
#include "msa/tensor.h"

namespace msa MSA_API {

enum class KvLayout : int32_t {
  kPacked = 0,  ///< k, v [S,Hkv,D], k_idx [S,Di], with cu_seqlens_k
  kPaged = 1,   ///< k, v [P,Hkv,Bk,D], k_idx [P,Bk,Di], with page_table and seq_lens
};

/// The static description of an operator call: everything a kernel is chosen by.
/// Fields an operator does not use are ignored. Defaults are those of MiniMax-M3.
struct Problem {
  Op op = Op::kSparseAttention;
  DType dtype = DType::kF32;  ///< of q, k, v and the index keys: f32, bf16 or f16
  KvLayout layout = KvLayout::kPacked;
  int32_t heads_q = 64;      ///< Hq, a multiple of heads_kv
  int32_t heads_kv = 4;      ///< Hkv, and Hi
  int32_t head_dim = 128;    ///< D
  int32_t index_dim = 128;   ///< Di
  int32_t block_size = 128;  ///< Bk, tokens; also the page size of a paged cache
  int32_t topk = 16;         ///< K >= 1
  int32_t init_blocks = 0;   ///< forced blocks at the start; init_blocks + local_blocks <= K
  int32_t local_blocks = 1;  ///< forced blocks at the query's end
  Device device{};

  int32_t group() const { return heads_kv > 0 ? heads_q / heads_kv : 0; }
};

/// Plans for at most so many new tokens of a sequence are for decoding steps: they split the keys
/// and take the kernels that are made for few tokens.
inline constexpr int64_t kDecodeTokens = 16;

/// Upper bounds of the calls a plan will serve. A workspace is sized by them.
struct Limits {
  int64_t max_batch = 1;     ///< B
  int64_t max_tokens = 1;    ///< T
  int64_t max_seqlen_q = 1;  ///< query tokens of one sequence
  int64_t max_seqlen_k = 1;  ///< key tokens of one sequence, the new ones included
  int32_t max_threads = 0;   ///< CPU threads a queue may bring; 0 = all of the machine's
};

/// Checks everything that needs no backend: positive sizes, Hq a multiple of Hkv, K >= 1,
/// init_blocks + local_blocks <= K, a known dtype and operator, packed keys for training.
/// Errors: kInvalidArgument, naming field, value and what is legal.
Status validate(const Problem& problem);
Status validate(const Limits& limits);

/// Work and traffic of one call. A multiply-add counts 2.
struct Cost {
  double flops = 0;  ///< of the matrix products, exact on visible (query, key) pairs
  double bytes = 0;  ///< compulsory traffic: every input read once, every output written once
};

/// Cost of `problem` for one sequence of `kv_len` tokens whose last `q_len` are new
/// (prefill of a whole context: q_len == kv_len). Sparse attention counts the pairs visible in
/// min(K, visible) blocks: the local block as far as it is visible, the others whole; its K and V
/// bytes are those pairs' in a decoding step, the whole context's beyond. Merge counts two
/// parts of the problem's dtype. Index LSE and KL count the selected support; K >= blocks is the
/// full one. Backward passes count each product once: five of attention, four of KL.
/// Source: arXiv 2606.13392, section on complexity; here pairs are counted exactly.
/// Precondition: validate(problem) is ok and 0 <= q_len <= kv_len.
Cost cost(const Problem& problem, int64_t q_len, int64_t kv_len);

/// The paper's ratio of dense to MSA FLOPs at N tokens, `2 Hq D N^2 / (Hi Di N^2 + 4 Hq D N K Bk)`:
/// for M3 6.4, 16, 25.6 and 28.4 at 32K, 128K, 512K and 1M.
double paper_flop_ratio(const Problem& problem, int64_t context);

}  // namespace msa MSA_API
