// Every way to call an operator wrongly: the message names the argument and what was given, and
// nothing is computed.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "core/check.h"
#include "msa/msa.h"
#include "tensors.h"

namespace msa {
namespace {

// Two sequences: 3 queries over 10 keys and 2 over 5, blocks of 4, so 3 and 2 blocks; T 6 with a
// padded row, Hq 4, Hkv 2, D 8, Di 16, K 3.
constexpr int64_t kTokens = 6;
const Problem kProblem{
    .heads_q = 4, .heads_kv = 2, .head_dim = 8, .index_dim = 16, .block_size = 4, .topk = 3};
const Limits kLimits{.max_batch = 2, .max_tokens = 6, .max_seqlen_q = 3, .max_seqlen_k = 12};

struct Packed : Tensors {
  Batch batch() { return {.cu_seqlens_q = ints({0, 3, 5}), .cu_seqlens_k = ints({0, 10, 15})}; }
  TensorView k() { return make(DType::kF32, {15, 2, 8}); }
  TensorView k_idx() { return make(DType::kF32, {15, 16}); }
};

struct Paged : Tensors {
  Batch batch() {
    return {.cu_seqlens_q = ints({0, 3, 5}),
            .seq_lens = ints({10, 5}),
            .page_table = ints({2, 3}, {5, 0, 3, 1, 4, 99})};
  }
  TensorView k() { return make(DType::kF32, {6, 2, 4, 8}); }
  TensorView k_idx() { return make(DType::kF32, {6, 4, 16}); }
};

template <class Storage>
struct Make : Storage {
  static constexpr KvLayout kLayout =
      std::is_same_v<Storage, Paged> ? KvLayout::kPaged : KvLayout::kPacked;

  IndexScoresParams index_scores() {
    return {.q_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .k_idx = this->k_idx(),
            .batch = this->batch(),
            .scores = this->make(DType::kF32, {2, kTokens, 3})};
  }
  SelectBlocksParams select_blocks() {
    return {.scores = this->make(DType::kF32, {2, kTokens, 3}),
            .num_valid_blocks = this->ints({1, 2, 3, 0, 3, 1}),
            .block_ids = this->make(DType::kI32, {2, kTokens, 3})};
  }
  IndexSelectParams index_select() {
    return {.q_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .k_idx = this->k_idx(),
            .batch = this->batch(),
            .block_ids = this->make(DType::kI32, {2, kTokens, 3}),
            .scores = this->make(DType::kF32, {2, kTokens, 3})};
  }
  TensorView ids() {
    const int32_t padded = 1234;  // never looked at
    std::vector<int32_t> one = {0, 1, 2,  2, 0,  -1, -1,     7,      7,
                                1, 0, -1, 0, -1, 9,  padded, padded, padded};
    std::vector<int32_t> both = one;
    both.insert(both.end(), one.begin(), one.end());
    return this->ints({2, kTokens, 3}, both);
  }
  SparseAttentionParams sparse_attention() {
    return {.q = this->make(DType::kF32, {kTokens, 4, 8}),
            .k = this->k(),
            .v = this->k(),
            .block_ids = ids(),
            .batch = this->batch(),
            .o = this->make(DType::kF32, {kTokens, 4, 8}),
            .lse = this->make(DType::kF32, {kTokens, 4})};
  }
  DenseAttentionParams dense_attention() {
    return {.q = this->make(DType::kF32, {kTokens, 4, 8}),
            .k = this->k(),
            .v = this->k(),
            .batch = this->batch(),
            .o = this->make(DType::kF32, {kTokens, 4, 8}),
            .lse = this->make(DType::kF32, {kTokens, 4}),
            .block_max = this->make(DType::kF32, {4, kTokens, 3})};
  }
  MergeParams merge() {
    return {.o_parts = this->make(DType::kF32, {2, kTokens, 4, 8}),
            .lse_parts = this->make(DType::kF32, {2, kTokens, 4}),
            .o = this->make(DType::kF32, {kTokens, 4, 8}),
            .lse = this->make(DType::kF32, {kTokens, 4})};
  }
  BlockListsParams block_lists() {
    return {.block_ids = ids(),
            .batch = this->batch(),
            .row_ptr = this->make(DType::kI32, {2, 6}),
            .entries = this->make(DType::kI32, {2, kTokens * 3})};
  }
  AppendPagedParams append_paged() {
    return {.k = this->make(DType::kF32, {kTokens, 2, 8}),
            .v = this->make(DType::kF32, {kTokens, 2, 8}),
            .k_idx = this->make(DType::kF32, {kTokens, 16}),
            .batch = this->batch(),
            .k_pages = this->k(),
            .v_pages = this->k(),
            .k_idx_pages = this->k_idx()};
  }
  LayerParams layer() {
    return {.q = this->make(DType::kF32, {kTokens, 4, 8}),
            .q_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .k = this->k(),
            .v = this->k(),
            .k_idx = this->k_idx(),
            .batch = this->batch(),
            .o = this->make(DType::kF32, {kTokens, 4, 8}),
            .lse = this->make(DType::kF32, {kTokens, 4}),
            .block_ids = this->make(DType::kI32, {2, kTokens, 3})};
  }
  BlockMassParams block_mass() {
    return {.q = this->make(DType::kF32, {kTokens, 4, 8}),
            .k = this->k(),
            .lse = this->make(DType::kF32, {kTokens, 4}),
            .batch = this->batch(),
            .mass = this->make(DType::kF32, {2, kTokens, 3})};
  }
  AttentionBackwardParams backward() {
    AttentionBackwardParams a{.q = this->make(DType::kF32, {kTokens, 4, 8}),
                              .k = this->k(),
                              .v = this->k(),
                              .block_ids = ids(),
                              .o = this->make(DType::kF32, {kTokens, 4, 8}),
                              .lse = this->make(DType::kF32, {kTokens, 4}),
                              .d_o = this->make(DType::kF32, {kTokens, 4, 8}),
                              .batch = this->batch(),
                              .row_ptr = this->make(DType::kI32, {2, 6}),
                              .entries = this->make(DType::kI32, {2, kTokens * 3}),
                              .dq = this->make(DType::kF32, {kTokens, 4, 8}),
                              .dk = this->k(),
                              .dv = this->k()};
    EXPECT_TRUE(
        call(lists_problem(), kLimits, BlockListsParams{a.block_ids, a.batch, a.row_ptr, a.entries})
            .ok());
    return a;
  }
  IndexLseParams index_lse() {
    return {.q_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .k_idx = this->k_idx(),
            .block_ids = ids(),
            .batch = this->batch(),
            .lse = this->make(DType::kF32, {kTokens, 2})};
  }
  KlParams kl() {
    return {.q = this->make(DType::kF32, {kTokens, 4, 8}),
            .k = this->k(),
            .lse = this->make(DType::kF32, {kTokens, 4}),
            .q_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .k_idx = this->k_idx(),
            .index_lse = this->make(DType::kF32, {kTokens, 2}),
            .batch = this->batch(),
            .dq_idx = this->make(DType::kF32, {kTokens, 2, 16}),
            .dk_idx = this->k_idx()};
  }
  static Problem lists_problem() {
    Problem problem = kProblem;
    problem.op = Op::kBlockLists;
    return problem;
  }
};

Plan plan_for(Op op, KvLayout layout, Limits limits = kLimits) {
  Problem problem = kProblem;
  problem.op = op;
  problem.layout = layout;
  Plan plan;
  EXPECT_TRUE(msa::plan(problem, limits, &plan, "reference").ok());
  return plan;
}

std::vector<std::byte> bytes_of(const TensorView& view) {
  const std::byte* data = static_cast<const std::byte*>(view.data);
  return {data, data + view.numel() * size_of(view.dtype)};
}

template <class Params>
struct Bad {
  std::string expected;  ///< what the message begins with
  std::function<void(Params&, Tensors&)> change;
};

/// The unchanged call works; each change makes an error that begins as said, and leaves `output` as
/// it was.
template <class Storage, class Params>
void expect_errors(Op op, Params (Make<Storage>::*make)(), TensorView Params::* output,
                   const std::vector<Bad<Params>>& list, Limits limits = kLimits) {
  Make<Storage> good;
  const Plan plan = plan_for(op, Make<Storage>::kLayout, limits);
  const Status status = call(plan, (good.*make)());
  ASSERT_TRUE(status.ok()) << status.message();
  for (const Bad<Params>& bad : list) {
    Make<Storage> storage;
    Params params = (storage.*make)();
    const TensorView given = params.*output;
    bad.change(params, storage);
    const std::vector<std::byte> before = bytes_of(given);
    const Status error = call(plan, params);
    EXPECT_EQ(error.code(), StatusCode::kInvalidArgument) << bad.expected;
    EXPECT_EQ(error.message().substr(0, bad.expected.size()), bad.expected);
    EXPECT_EQ(error.message().find('\n'), std::string::npos);
    EXPECT_EQ(bytes_of(given), before) << "touched in spite of: " << bad.expected;
  }
}

void set(const TensorView& view, int64_t i, int32_t value) { view.at<int32_t>()[i] = value; }

using Index = IndexScoresParams;
using Select = SelectBlocksParams;
using Fused = IndexSelectParams;
using Sparse = SparseAttentionParams;
using Dense = DenseAttentionParams;
using Lists = BlockListsParams;
using Append = AppendPagedParams;
using Mass = BlockMassParams;
using Layer = LayerParams;
using Backward = AttentionBackwardParams;
using Lse = IndexLseParams;
using Kl = KlParams;

TEST(Check, TensorsOfAnyOperator) {
  expect_errors<Packed, Sparse>(
      Op::kSparseAttention, &Make<Packed>::sparse_attention, &Sparse::o,
      {
          {"q: not given, expected [T,Hq,D] of f32", [](Sparse& a, Tensors&) { a.q = {}; }},
          {"v: not given", [](Sparse& a, Tensors&) { a.v = {}; }},
          {"o: not given", [](Sparse& a, Tensors&) { a.o = {}; }},
          {"block_ids: not given", [](Sparse& a, Tensors&) { a.block_ids = {}; }},
          {"q: got dtype bf16, expected f32",
           [](Sparse& a, Tensors&) { a.q.dtype = DType::kBF16; }},
          {"k: got dtype f16, expected f32", [](Sparse& a, Tensors&) { a.k.dtype = DType::kF16; }},
          {"block_ids: got dtype f32, expected i32",
           [](Sparse& a, Tensors&) { a.block_ids.dtype = DType::kF32; }},
          {"o: got dtype f16, expected f32", [](Sparse& a, Tensors&) { a.o.dtype = DType::kF16; }},
          {"lse: got dtype bf16", [](Sparse& a, Tensors&) { a.lse.dtype = DType::kBF16; }},
          {"q: got device kind 2 id 0",
           [](Sparse& a, Tensors&) { a.q.device.kind = DeviceKind::kCUDA; }},
          {"k: got device kind 1 id 3", [](Sparse& a, Tensors&) { a.k.device.id = 3; }},
          {"q: got rank 2 shape [6,4], expected [T,Hq,D] = [*,4,8]",
           [](Sparse& a, Tensors&) { a.q.rank = 2; }},
          {"q: got rank 9 shape [6,4,8,0]", [](Sparse& a, Tensors&) { a.q.rank = 9; }},
          {"q: got rank -1", [](Sparse& a, Tensors&) { a.q.rank = -1; }},
          {"q: got rank 3 shape [6,5,8], expected [T,Hq,D] = [*,4,8]",
           [](Sparse& a, Tensors&) { a.q.shape[1] = 5; }},
          {"q: got rank 3 shape [-6,4,8]", [](Sparse& a, Tensors&) { a.q.shape[0] = -6; }},
          {"k: got rank 3 shape [15,2,7], expected [S,Hkv,D] = [*,2,8]",
           [](Sparse& a, Tensors&) { a.k.shape[2] = 7; }},
          {"v: got rank 3 shape [14,2,8], expected [S,Hkv,D] = [15,2,8]",
           [](Sparse& a, Tensors&) { a.v.shape[0] = 14; }},
          {"o: got rank 3 shape [5,4,8], expected [T,Hq,D] = [6,4,8]",
           [](Sparse& a, Tensors&) { a.o.shape[0] = 5; }},
          {"lse: got rank 2 shape [6,2], expected [T,Hq] = [6,4]",
           [](Sparse& a, Tensors&) { a.lse.shape[1] = 2; }},
          {"block_ids: got rank 3 shape [4,6,3], expected [Hkv,T,K] = [2,6,3]",
           [](Sparse& a, Tensors&) { a.block_ids.shape[0] = 4; }},
          {"block_ids: got rank 3 shape [2,6,2], expected [Hkv,T,K] = [2,6,3]",
           [](Sparse& a, Tensors&) { a.block_ids.shape[2] = 2; }},
          {"q: got innermost stride 2, expected 1", [](Sparse& a, Tensors&) { a.q.stride[2] = 2; }},
          {"o: got innermost stride 0", [](Sparse& a, Tensors&) { a.o.stride[2] = 0; }},
          {"o: got stride 0 on axis 0 of extent 6", [](Sparse& a, Tensors&) { a.o.stride[0] = 0; }},
          {"lse: got stride 0 on axis 0", [](Sparse& a, Tensors&) { a.lse.stride[0] = 0; }},
          {"q: got null data", [](Sparse& a, Tensors&) { a.q.data = nullptr; }},
          {"o: got null data", [](Sparse& a, Tensors&) { a.o.data = nullptr; }},
          {"k: got an address that is not a multiple of 4",
           [](Sparse& a, Tensors&) { a.k.data = static_cast<std::byte*>(a.k.data) + 2; }},
          {"softmax_scale: got nan", [](Sparse& a, Tensors&) { a.softmax_scale = NAN; }},
          {"softmax_scale: got inf", [](Sparse& a, Tensors&) { a.softmax_scale = INFINITY; }},
      });
}

TEST(Check, PackedBatch) {
  expect_errors<Packed, Dense>(
      Op::kDenseAttention, &Make<Packed>::dense_attention, &Dense::o,
      {
          {"cu_seqlens_q: not given", [](Dense& a, Tensors&) { a.batch.cu_seqlens_q = {}; }},
          {"cu_seqlens_k: not given", [](Dense& a, Tensors&) { a.batch.cu_seqlens_k = {}; }},
          {"cu_seqlens_q: got 0 elements",
           [](Dense& a, Tensors& t) { a.batch.cu_seqlens_q = t.make(DType::kI32, {0}); }},
          {"cu_seqlens_k: got rank 1 shape [2], expected [B+1] = [3]",
           [](Dense& a, Tensors& t) { a.batch.cu_seqlens_k = t.ints({0, 10}); }},
          {"cu_seqlens_q[0]: got 1, expected 0",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_q, 0, 1); }},
          {"cu_seqlens_q[2]: got 2 after 3",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_q, 2, 2); }},
          {"cu_seqlens_q[1]: got -1 after 0",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_q, 1, -1); }},
          {"cu_seqlens_q[1]: got a length of 4, the plan's max_seqlen_q is 3",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_q, 1, 4); }},
          {"cu_seqlens_q[3]: got 7, the tensor has 6 rows",
           [](Dense& a, Tensors& t) {
             a.batch.cu_seqlens_q = t.ints({0, 3, 5, 7});
             a.batch.cu_seqlens_k = t.ints({0, 10, 15, 15});
           }},
          {"cu_seqlens_k[0]: got 2", [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_k, 0, 2); }},
          {"cu_seqlens_k[1]: got a length of 13, the plan's max_seqlen_k is 12",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_k, 1, 13); }},
          {"cu_seqlens_k[2]: got 16, the tensor has 15 rows",
           [](Dense& a, Tensors&) { set(a.batch.cu_seqlens_k, 2, 16); }},
          {"seq_lens: given, expected cu_seqlens_k alone",
           [](Dense& a, Tensors& t) { a.batch.seq_lens = t.ints({10, 5}); }},
          {"page_table: given, expected cu_seqlens_k alone",
           [](Dense& a, Tensors& t) { a.batch.page_table = t.make(DType::kI32, {2, 3}); }},
          {"page_rows: given, expected cu_seqlens_k alone",
           [](Dense& a, Tensors& t) { a.batch.page_rows = t.ints({0, 1}); }},
          {"q_offset: got rank 1 shape [3], expected [B] = [2]",
           [](Dense& a, Tensors& t) { a.batch.q_offset = t.ints({0, 0, 0}); }},
          {"q_offset[1]: got -4, expected >= 0",
           [](Dense& a, Tensors& t) { a.batch.q_offset = t.ints({0, -4}); }},
          {"block_offset[0]: got -1, expected >= 0",
           [](Dense& a, Tensors& t) { a.batch.block_offset = t.ints({-1, 0}); }},
          {"block_offset: got dtype f32, expected i32",
           [](Dense& a, Tensors& t) { a.batch.block_offset = t.make(DType::kF32, {2}); }},
          {"block_max: got 2 columns, the longest sequence has 3 blocks",
           [](Dense& a, Tensors&) { a.block_max.shape[2] = 2; }},
          {"block_max: got rank 3 shape [2,6,3], expected [Hq,T,blocks] = [4,6,*]",
           [](Dense& a, Tensors&) { a.block_max.shape[0] = 2; }},
          {"block_max: got innermost stride",
           [](Dense& a, Tensors&) { a.block_max.stride[2] = 5; }},
      },
      {.max_batch = 3, .max_tokens = 6, .max_seqlen_q = 3, .max_seqlen_k = 12});
}

TEST(Check, PagedBatch) {
  expect_errors<Paged, Fused>(
      Op::kIndexSelect, &Make<Paged>::index_select, &Fused::block_ids,
      {
          {"seq_lens: not given", [](Fused& a, Tensors&) { a.batch.seq_lens = {}; }},
          {"page_table: not given", [](Fused& a, Tensors&) { a.batch.page_table = {}; }},
          {"cu_seqlens_k: given, expected seq_lens alone",
           [](Fused& a, Tensors& t) { a.batch.cu_seqlens_k = t.ints({0, 1, 2}); }},
          {"seq_lens: got rank 1 shape [3], expected [B] = [2]",
           [](Fused& a, Tensors& t) { a.batch.seq_lens = t.ints({1, 2, 3}); }},
          {"seq_lens[1]: got -1, expected 0..12",
           [](Fused& a, Tensors&) { set(a.batch.seq_lens, 1, -1); }},
          {"seq_lens[0]: got 13, expected 0..12",
           [](Fused& a, Tensors&) { set(a.batch.seq_lens, 0, 13); }},
          {"page_table: got 2 columns, sequence 0 needs 3 for 10 tokens",
           [](Fused& a, Tensors&) { a.batch.page_table.shape[1] = 2; }},
          {"page_table[0,2]: got 6, expected 0..5",
           [](Fused& a, Tensors&) { set(a.batch.page_table, 2, 6); }},
          {"page_table[1,0]: got -1, expected 0..5",
           [](Fused& a, Tensors&) { set(a.batch.page_table, 3, -1); }},
          {"page_table[1,2]: got 99, expected 0..5",
           [](Fused& a, Tensors&) { set(a.batch.seq_lens, 1, 9); }},
          {"page_table: got innermost stride -1, expected 0..536870911",
           [](Fused& a, Tensors&) { a.batch.page_table.stride[1] = -1; }},
          {"page_table: got rank 2 shape [3,3], expected [B,max_pages] = [2,*]",
           [](Fused& a, Tensors& t) { a.batch.page_table = t.make(DType::kI32, {3, 3}); }},
          {"page_table: got rank 1 shape [6], expected [B,max_pages] = [2,*]",
           [](Fused& a, Tensors& t) { a.batch.page_table = t.ints({5, 0, 3, 1, 4, 2}); }},
          {"page_rows: got rank 1 shape [3], expected [B] = [2]",
           [](Fused& a, Tensors& t) { a.batch.page_rows = t.ints({0, 1, 1}); }},
          {"page_rows[1]: got 2, expected 0..1, rows of page_table",
           [](Fused& a, Tensors& t) { a.batch.page_rows = t.ints({0, 2}); }},
          {"page_rows[0]: got -1, expected 0..1, rows of page_table",
           [](Fused& a, Tensors& t) { a.batch.page_rows = t.ints({-1, 0}); }},
          {"page_rows[1]: got 6, expected 0..5, entries of page_table",
           [](Fused& a, Tensors& t) {
             a.batch.page_table = t.ints({5, 0, 3, 1, 4});
             a.batch.page_rows = t.ints({0, 6});
           }},
          {"page_table: got 1 entries, sequence 1 needs 2 for 5 tokens",
           [](Fused& a, Tensors& t) {
             a.batch.page_table = t.ints({5, 0, 3, 1, 4});
             a.batch.page_rows = t.ints({0, 4});
           }},
          {"page_table[1,1]: got 9, expected 0..5",
           [](Fused& a, Tensors& t) {
             a.batch.page_table = t.ints({5, 0, 3, 1, 9});
             a.batch.page_rows = t.ints({0, 3});
           }},
          {"k_idx: got rank 3 shape [6,8,16], expected [P,Bk,Di] = [*,4,16]",
           [](Fused& a, Tensors& t) { a.k_idx = t.make(DType::kF32, {6, 8, 16}); }},
          {"k_idx: got rank 2",
           [](Fused& a, Tensors& t) { a.k_idx = t.make(DType::kF32, {24, 16}); }},
          {"scores: got rank 3 shape [2,6,4], expected [Hi,T,K] = [2,6,3]",
           [](Fused& a, Tensors&) { a.scores.shape[2] = 4; }},
          {"block_ids: got stride 0 on axis 0",
           [](Fused& a, Tensors&) { a.block_ids.stride[0] = 0; }},
      });
}

TEST(Check, PlanLimits) {
  const auto message = [](const Limits& limits) {
    Make<Packed> storage;
    const Plan plan = plan_for(Op::kIndexScores, KvLayout::kPacked, limits);
    return call(plan, storage.index_scores()).message();
  };
  EXPECT_EQ(message(kLimits), "");
  Limits limits = kLimits;
  limits.max_batch = 1;
  EXPECT_EQ(message(limits), "B: got 2, the plan's max_batch is 1");
  limits = kLimits;
  limits.max_tokens = 5;
  EXPECT_EQ(message(limits), "T: got 6, the plan's max_tokens is 5");
  limits = kLimits;
  limits.max_seqlen_q = 2;
  EXPECT_EQ(message(limits), "cu_seqlens_q[1]: got a length of 3, the plan's max_seqlen_q is 2");
  limits = kLimits;
  limits.max_seqlen_k = 9;
  EXPECT_EQ(message(limits), "cu_seqlens_k[1]: got a length of 10, the plan's max_seqlen_k is 9");
}

TEST(Check, IndexScores) {
  expect_errors<Packed, Index>(
      Op::kIndexScores, &Make<Packed>::index_scores, &Index::scores,
      {
          {"scores: got 2 columns, the longest sequence has 3 blocks",
           [](Index& a, Tensors&) { a.scores.shape[2] = 2; }},
          {"scores: got stride 0 on axis 2", [](Index& a, Tensors&) { a.scores.stride[2] = 0; }},
          {"q_idx: got rank 3 shape [6,4,16], expected [T,Hi,Di] = [*,2,16]",
           [](Index& a, Tensors&) { a.q_idx.shape[1] = 4; }},
          {"k_idx: got rank 2 shape [15,8], expected [S,Di] = [*,16]",
           [](Index& a, Tensors&) { a.k_idx.shape[1] = 8; }},
      });
  // Any strides, also the innermost.
  Make<Packed> storage;
  IndexScoresParams a = storage.index_scores();
  a.scores.stride = {1, 6, 2, 0};
  a.scores.stride[1] = 2, a.scores.stride[2] = 12;
  EXPECT_TRUE(call(plan_for(Op::kIndexScores, KvLayout::kPacked), a).ok());
}

TEST(Check, SelectBlocks) {
  expect_errors<Packed, Select>(
      Op::kSelectBlocks, &Make<Packed>::select_blocks, &Select::block_ids,
      {
          {"num_valid_blocks[1]: got 4, expected 0..3",
           [](Select& a, Tensors&) { set(a.num_valid_blocks, 1, 4); }},
          {"num_valid_blocks[5]: got -1, expected 0..3",
           [](Select& a, Tensors&) { set(a.num_valid_blocks, 5, -1); }},
          {"num_valid_blocks: got rank 1 shape [5], expected [T] = [6]",
           [](Select& a, Tensors&) { a.num_valid_blocks.shape[0] = 5; }},
          {"blocks: got 4, the plan's max_seqlen_k in blocks is 3",
           [](Select& a, Tensors& t) { a.scores = t.make(DType::kF32, {2, kTokens, 4}); }},
          {"T: got 7, the plan's max_tokens is 6",
           [](Select& a, Tensors& t) { a.scores = t.make(DType::kF32, {2, 7, 3}); }},
          {"block_ids: got rank 3 shape [2,6,2], expected [Hi,T,K] = [2,6,3]",
           [](Select& a, Tensors&) { a.block_ids.shape[2] = 2; }},
          {"scores: got dtype f16", [](Select& a, Tensors&) { a.scores.dtype = DType::kF16; }},
      });
}

TEST(Check, Ids) {
  expect_errors<Packed, Sparse>(
      Op::kSparseAttention, &Make<Packed>::sparse_attention, &Sparse::o,
      {
          {"block_ids[0,0,1]: got 3, expected -1 or a block of sequence 0, which has 3",
           [](Sparse& a, Tensors&) { *a.block_ids.at<int32_t>(0, 0, 1) = 3; }},
          {"block_ids[1,4,0]: got 2, expected -1 or a block of sequence 1, which has 2",
           [](Sparse& a, Tensors&) { *a.block_ids.at<int32_t>(1, 4, 0) = 2; }},
          {"block_ids[0,1,1]: got -2",
           [](Sparse& a, Tensors&) { *a.block_ids.at<int32_t>(0, 1, 1) = -2; }},
          {"block_ids[0,0,2]: got 0 a second time, expected distinct blocks",
           [](Sparse& a, Tensors&) { *a.block_ids.at<int32_t>(0, 0, 2) = 0; }},
          {"block_ids[0,0,0]: got -2",  // of a shard too, where other ids belong to other shards
           [](Sparse& a, Tensors& t) {
             a.batch.block_offset = t.ints({1, 0});
             *a.block_ids.at<int32_t>(0, 0, 0) = -2;
           }},
      });
}

TEST(Check, IdsOfShardsAndSharedLists) {
  const Plan plan = plan_for(Op::kSparseAttention, KvLayout::kPacked);
  Make<Packed> storage;
  SparseAttentionParams a = storage.sparse_attention();
  a.batch.block_offset = storage.ints({7, 0});
  *a.block_ids.at<int32_t>(0, 0, 1) = 1 << 30;  // another shard's
  EXPECT_TRUE(call(plan, a).ok());
  a = storage.sparse_attention();
  a.block_ids.stride[0] = 0;
  EXPECT_TRUE(call(plan, a).ok());
  *a.block_ids.at<int32_t>(0, 3, 1) = 2;
  EXPECT_EQ(call(plan, a).message().substr(0, 24), "block_ids[0,3,1]: got 2,");
}

TEST(Check, DistinctIdsInAnyOrder) {
  const Plan plan = plan_for(Op::kSparseAttention, KvLayout::kPacked);
  Make<Packed> storage;
  SparseAttentionParams a = storage.sparse_attention();
  a.batch.block_offset = storage.ints({7, 0});  // any id is legal
  const auto with = [&](std::array<int32_t, 3> list) {
    std::copy(list.begin(), list.end(), a.block_ids.at<int32_t>(0, 1));
    return call(plan, a).message();
  };
  EXPECT_EQ(with({8193, 4097, 1}), "");  // far apart by a round number
  EXPECT_EQ(with({4097, 8193, 1}), "");
  EXPECT_EQ(with({9, 4097, -1}), "");
  EXPECT_EQ(with({4097, 1, 4097}),
            "block_ids[0,1,2]: got 4097 a second time, expected distinct blocks");
  EXPECT_EQ(with({5, 5, -1}), "block_ids[0,1,1]: got 5 a second time, expected distinct blocks");
  EXPECT_EQ(with({5, -1, 5}), "");  // behind the end
}

TEST(Check, Merge) {
  expect_errors<Packed, MergeParams>(
      Op::kMerge, &Make<Packed>::merge, &MergeParams::o,
      {
          {"o_parts: got 0 parts, expected at least 1",
           [](MergeParams& a, Tensors&) { a.o_parts.shape[0] = a.lse_parts.shape[0] = 0; }},
          {"lse_parts: got rank 3 shape [3,6,4], expected [parts,T,Hq] = [2,6,4]",
           [](MergeParams& a, Tensors& t) { a.lse_parts = t.make(DType::kF32, {3, 6, 4}); }},
          {"o: got rank 3 shape [6,4,4]", [](MergeParams& a, Tensors&) { a.o.shape[2] = 4; }},
          {"T: got 7, the plan's max_tokens is 6",
           [](MergeParams& a, Tensors& t) { a.o_parts = t.make(DType::kF32, {2, 7, 4, 8}); }},
      });
}

TEST(Check, BlockLists) {
  expect_errors<Packed, Lists>(
      Op::kBlockLists, &Make<Packed>::block_lists, &Lists::entries,
      {
          {"row_ptr: got rank 2 shape [2,5], expected [Hkv,NB+1] = [2,6]",
           [](Lists& a, Tensors&) { a.row_ptr.shape[1] = 5; }},
          {"entries: got rank 2 shape [2,17], expected [Hkv,T*K] = [2,18]",
           [](Lists& a, Tensors&) { a.entries.shape[1] = 17; }},
          {"block_ids[1,0,0]: got 3",
           [](Lists& a, Tensors&) { *a.block_ids.at<int32_t>(1, 0, 0) = 3; }},
          {"block_ids[1,0,1]: got 0 a second time",
           [](Lists& a, Tensors&) { *a.block_ids.at<int32_t>(1, 0, 1) = 0; }},
      });
  // The sequences' lengths alone, without a page table.
  Make<Paged> storage;
  BlockListsParams a = storage.block_lists();
  a.batch.page_table = {};
  EXPECT_TRUE(call(plan_for(Op::kBlockLists, KvLayout::kPaged), a).ok());
}

TEST(Check, AppendPaged) {
  expect_errors<Paged, Append>(
      Op::kAppendPaged, &Make<Paged>::append_paged, &Append::k_pages,
      {
          {"k: not given, nor k_idx", [](Append& a, Tensors&) { a.k = a.v = a.k_idx = {}; }},
          {"v: not given", [](Append& a, Tensors&) { a.v = {}; }},
          {"k: not given", [](Append& a, Tensors&) { a.k = {}; }},
          {"k_pages: not given", [](Append& a, Tensors&) { a.k_pages = {}; }},
          {"k_idx_pages: not given", [](Append& a, Tensors&) { a.k_idx_pages = {}; }},
          {"v: got rank 3 shape [5,2,8], expected [T,Hkv,D] = [6,2,8]",
           [](Append& a, Tensors&) { a.v.shape[0] = 5; }},
          {"k_idx: got rank 2 shape [5,16], expected [T,Di] = [6,16]",
           [](Append& a, Tensors&) { a.k_idx.shape[0] = 5; }},
          {"k_idx_pages: got rank 3 shape [5,4,16], expected [P,Bk,Di] = [6,4,16]",
           [](Append& a, Tensors&) { a.k_idx_pages.shape[0] = 5; }},
          {"seq_lens[1]: got 1, expected at least the 2 new tokens",
           [](Append& a, Tensors&) { set(a.batch.seq_lens, 1, 1); }},
          {"page_table[0,1]: got 77, expected 0..5",
           [](Append& a, Tensors&) { set(a.batch.page_table, 1, 77); }},
          {"page_table: not given", [](Append& a, Tensors&) { a.batch.page_table = {}; }},
      });
  // Pages of old tokens are nobody's business: they may have been evicted.
  Make<Paged> storage;
  AppendPagedParams a = storage.append_paged();
  set(a.batch.page_table, 0, -1);
  EXPECT_TRUE(call(plan_for(Op::kAppendPaged, KvLayout::kPaged), a).ok());
  set(a.batch.seq_lens, 1, 0);  // a padded sequence
  EXPECT_TRUE(call(plan_for(Op::kAppendPaged, KvLayout::kPaged), a).ok());
}

TEST(Check, BlockMass) {
  expect_errors<Packed, Mass>(
      Op::kBlockMass, &Make<Packed>::block_mass, &Mass::mass,
      {
          {"lse: not given", [](Mass& a, Tensors&) { a.lse = {}; }},
          {"mass: got 1 columns", [](Mass& a, Tensors&) { a.mass.shape[2] = 1; }},
          {"mass: got rank 3 shape [4,6,3], expected [Hkv,T,blocks] = [2,6,*]",
           [](Mass& a, Tensors&) { a.mass.shape[0] = 4; }},
      });
}

TEST(Check, Layer) {
  expect_errors<Paged, Layer>(
      Op::kLayer, &Make<Paged>::layer, &Layer::o,
      {
          {"q_idx: not given", [](Layer& a, Tensors&) { a.q_idx = {}; }},
          {"q_idx: got rank 3 shape [5,2,16], expected [T,Hi,Di] = [6,2,16]",
           [](Layer& a, Tensors&) { a.q_idx.shape[0] = 5; }},
          {"k_idx: got rank 3 shape [5,4,16], expected [P,Bk,Di] = [6,4,16]",
           [](Layer& a, Tensors&) { a.k_idx.shape[0] = 5; }},
          {"block_ids: got rank 3 shape [2,6,2], expected [Hkv,T,K] = [2,6,3]",
           [](Layer& a, Tensors&) { a.block_ids.shape[2] = 2; }},
          {"softmax_scale: got inf", [](Layer& a, Tensors&) { a.softmax_scale = INFINITY; }},
      });
  // Lengths and pages are looked at before the lists are chosen; lse and ids may be left out.
  Make<Paged> storage;
  LayerParams a = storage.layer();
  a.lse = a.block_ids = {};
  EXPECT_TRUE(call(plan_for(Op::kLayer, KvLayout::kPaged), a).ok());
  set(a.batch.page_table, 1, 77);
  EXPECT_EQ(call(plan_for(Op::kLayer, KvLayout::kPaged), a).message(),
            "page_table[0,1]: got 77, expected 0..5");
}

TEST(Check, AttentionBackward) {
  expect_errors<Packed, Backward>(
      Op::kSparseAttentionBackward, &Make<Packed>::backward, &Backward::dq,
      {
          {"block_ids: not given", [](Backward& a, Tensors&) { a.block_ids = {}; }},
          {"o: not given", [](Backward& a, Tensors&) { a.o = {}; }},
          {"d_o: got rank 3 shape [6,4,7]", [](Backward& a, Tensors&) { a.d_o.shape[2] = 7; }},
          {"lse: got dtype bf16", [](Backward& a, Tensors&) { a.lse.dtype = DType::kBF16; }},
          {"dk: got dtype f16, expected f32",
           [](Backward& a, Tensors&) { a.dk.dtype = DType::kF16; }},
          {"dv: got rank 3 shape [14,2,8], expected [S,Hkv,D] = [15,2,8]",
           [](Backward& a, Tensors&) { a.dv.shape[0] = 14; }},
          {"dq: got stride 0 on axis 0", [](Backward& a, Tensors&) { a.dq.stride[0] = 0; }},
          {"block_ids[0,0,1]: got 3", [](Backward& a, Tensors&) { set(a.block_ids, 1, 3); }},
          {"block_ids[0,0,1]: got 0 a second time",
           [](Backward& a, Tensors&) {
             set(a.block_ids, 1, 0);
             a.row_ptr = a.entries = {};
           }},
          {"row_ptr: not given", [](Backward& a, Tensors&) { a.row_ptr = {}; }},
          {"entries: not given", [](Backward& a, Tensors&) { a.entries = {}; }},
          {"row_ptr: got rank 2 shape [2,5]",
           [](Backward& a, Tensors&) { a.row_ptr.shape[1] = 5; }},
          {"row_ptr[0,0]: got 1", [](Backward& a, Tensors&) { set(a.row_ptr, 0, 1); }},
          {"row_ptr[0,2]: got 99", [](Backward& a, Tensors&) { set(a.row_ptr, 2, 99); }},
          {"entries[0,0]: got -1", [](Backward& a, Tensors&) { set(a.entries, 0, -1); }},
          {"entries[0,0]: got 1", [](Backward& a, Tensors&) { set(a.entries, 0, 1); }},
          {"row_ptr[0,5]: got 7, ids list 8 blocks",
           [](Backward& a, Tensors&) { set(a.row_ptr, 5, 7); }},
      });
}

TEST(Check, DenseBackwardTakesNoLists) {
  Make<Packed> storage;
  Backward a = storage.backward();
  const Plan plan = plan_for(Op::kDenseAttentionBackward, KvLayout::kPacked);
  EXPECT_EQ(call(plan, a).message(), "block_ids: given, dense_attention_backward takes none");
  a.block_ids = {};
  EXPECT_EQ(call(plan, a).message(), "row_ptr: given, dense_attention_backward takes none");
  a.row_ptr = a.entries = {};
  EXPECT_TRUE(call(plan, a).ok());
}

TEST(Check, TrainingTakesPackedKeys) {
  Problem problem = kProblem;
  problem.layout = KvLayout::kPaged;
  for (Op op : {Op::kSparseAttentionBackward, Op::kDenseAttentionBackward, Op::kIndexLse,
                Op::kKlBackward, Op::kKlLoss}) {
    problem.op = op;
    Plan plan;
    EXPECT_EQ(msa::plan(problem, kLimits, &plan).message(),
              std::string("layout: got paged, ") + name_of(op) + " takes packed keys only");
  }
}

TEST(Check, IndexLse) {
  expect_errors<Packed, Lse>(
      Op::kIndexLse, &Make<Packed>::index_lse, &Lse::lse,
      {
          {"k_idx: not given", [](Lse& a, Tensors&) { a.k_idx = {}; }},
          {"block_ids: got rank 3 shape [2,6,2]",
           [](Lse& a, Tensors&) { a.block_ids.shape[2] = 2; }},
          {"block_ids[0,0,2]: got 9", [](Lse& a, Tensors&) { set(a.block_ids, 2, 9); }},
          {"lse: got rank 2 shape [6,4]", [](Lse& a, Tensors&) { a.lse.shape[1] = 4; }},
      });
}

TEST(Check, Kl) {
  expect_errors<Packed, Kl>(
      Op::kKlBackward, &Make<Packed>::kl, &Kl::dq_idx,
      {
          {"index_lse: not given", [](Kl& a, Tensors&) { a.index_lse = {}; }},
          {"k_idx: got rank 2 shape [14,16]", [](Kl& a, Tensors&) { a.k_idx.shape[0] = 14; }},
          {"dk_idx: not given", [](Kl& a, Tensors&) { a.dk_idx = {}; }},
          {"softmax_scale: got inf", [](Kl& a, Tensors&) { a.softmax_scale = INFINITY; }},
          {"kl: got rank 2 shape [6,4]",
           [](Kl& a, Tensors& t) { a.kl = t.make(DType::kF32, {6, 4}); }},
          {"row_ptr: given, expected none without ids",
           [](Kl& a, Tensors& t) { a.row_ptr = t.make(DType::kI32, {2, 6}); }},
      });
  Make<Packed> storage;
  Kl a = storage.kl();
  const Plan plan = plan_for(Op::kKlLoss, KvLayout::kPacked);
  EXPECT_EQ(call(plan, a).message(), "dq_idx: given, kl_loss takes none");
  a.dq_idx = a.dk_idx = {};
  EXPECT_EQ(call(plan, a).message().substr(0, 14), "kl: not given,");
  a.kl = storage.make(DType::kF32, {kTokens, 2});
  EXPECT_TRUE(call(plan, a).ok());
}

TEST(Check, PlanAndWorkspace) {
  Make<Packed> storage;
  const Plan plan = plan_for(Op::kDenseAttention, KvLayout::kPacked);
  EXPECT_EQ(call(plan, storage.sparse_attention()).message(),
            "plan: made for dense_attention, called with the arguments of sparse_attention");
  EXPECT_FALSE(call(Plan{}, storage.dense_attention()).ok());

  ASSERT_GT(plan.workspace_bytes, 64);
  alignas(64) static std::byte memory[1 << 20];
  const size_t bytes = static_cast<size_t>(plan.workspace_bytes);
  ASSERT_LE(bytes, sizeof memory - 64);
  const DenseAttentionParams a = storage.dense_attention();
  EXPECT_TRUE(run(plan, a, {memory, bytes}).ok());
  EXPECT_EQ(run(plan, a, {memory, bytes - 1}).message().substr(0, 15), "workspace: got ");
  EXPECT_FALSE(run(plan, a, {nullptr, bytes}).ok());
  EXPECT_FALSE(run(plan, a, {memory + 4, bytes}).ok());
}

TEST(Check, EmptyCallsAreFine) {
  Tensors t;
  const SparseAttentionParams nothing{
      .q = t.make(DType::kF32, {0, 4, 8}),
      .k = t.make(DType::kF32, {0, 2, 8}),
      .v = t.make(DType::kF32, {0, 2, 8}),
      .block_ids = t.make(DType::kI32, {2, 0, 3}),
      .batch = {.cu_seqlens_q = t.ints({0}), .cu_seqlens_k = t.ints({0})},
      .o = TensorView::contiguous(nullptr, DType::kF32, {0, 4, 8})};
  const Status status = call(plan_for(Op::kSparseAttention, KvLayout::kPacked), nothing);
  EXPECT_TRUE(status.ok()) << status.message();
}

}  // namespace
}  // namespace msa
