#include "cuda/smxx/plain.h"

#include "core/text.h"

namespace msa::cuda::plain {
namespace {

/// Whether a row is `head_dim` or `index_dim` long.
bool reads_index(Op op) { return op == Op::kIndexScores || op == Op::kIndexSelect; }

bool reads_rows(Op op) {
  return reads_index(op) || op == Op::kSparseAttention || op == Op::kSparseDecode ||
         op == Op::kDenseAttention || op == Op::kBlockMass;
}

}  // namespace

Status supports(const Problem& problem, const DeviceInfo& device) {
  if (is_training(problem.op))
    return error(StatusCode::kUnsupported, "op: got ", name_of(problem.op),
                 ", supported: the forward operators; training runs on the CPU");
  constexpr int32_t kMostHeads = 65535;  // of a grid's y
  if (problem.heads_q > kMostHeads)
    return error(StatusCode::kUnsupported, "heads_q: got ", problem.heads_q, ", supported up to ",
                 kMostHeads);
  if (!reads_rows(problem.op)) return {};
  const bool index = reads_index(problem.op);
  Problem rows = problem;
  if (index) rows.head_dim = problem.index_dim, rows.heads_q = problem.heads_kv, rows.heads_kv = 1;
  const int64_t needed = attention_shared_bytes(rows);
  if (needed > device.shared_bytes)
    return error(StatusCode::kUnsupported, index ? "index_dim" : "head_dim", ": got ",
                 rows.head_dim, ", which takes ", needed, " bytes of shared memory, ", device.name,
                 " has ", device.shared_bytes);
  return {};
}

int64_t workspace_bytes(const Problem& problem, const Limits& limits) {
  if (problem.op == Op::kIndexSelect) return index_select_bytes(problem, limits);
  if (problem.op == Op::kBlockLists) return block_lists_bytes(problem, limits);
  return 0;
}

}  // namespace msa::cuda::plain
