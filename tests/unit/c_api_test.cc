// The C interface computes what the C++ one does, and its structs grow without breaking callers.
#include "msa/c_api.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "msa/msa.h"

// The C idiom: a field that is not named is zero.
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"

namespace {

using msa::TensorView;

constexpr int64_t kTokens = 21, kKeys = 40, kHeads = 4, kKvHeads = 2, kDim = 16, kBlock = 8,
                  kTopk = 3, kBlocks = 4, kPages = 7;

std::vector<float> random_floats(int64_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(generator);
  return values;
}

/// A tensor as both interfaces see it.
struct Both {
  msa_tensor c;
  TensorView cpp;
  Both(const void* data, msa_dtype dtype, std::initializer_list<int64_t> shape)
      : c(msa_tensor_contiguous(data, dtype, static_cast<int32_t>(shape.size()), shape.begin())),
        cpp(TensorView::contiguous(data, static_cast<msa::DType>(dtype), shape)) {}
};

/// An output of either interface: poisoned, then written by it.
template <class T>
struct Out {
  std::vector<T> memory[2];
  msa_tensor c;
  TensorView cpp;
  Out(msa_dtype dtype, std::initializer_list<int64_t> shape) {
    int64_t count = 1;
    for (int64_t extent : shape) count *= extent;
    memory[0].assign(static_cast<size_t>(count), T(-77));
    memory[1].assign(static_cast<size_t>(count), T(-88));
    c = Both(memory[0].data(), dtype, shape).c;
    cpp = Both(memory[1].data(), dtype, shape).cpp;
  }
  /// Both wrote the same bits, everywhere.
  void expect_same() const {
    EXPECT_EQ(std::memcmp(memory[0].data(), memory[1].data(), memory[0].size() * sizeof(T)), 0);
  }
};

msa_problem small_problem(msa_op op, msa_kv_layout layout = MSA_PACKED) {
  msa_problem problem = MSA_PROBLEM_INIT;
  problem.op = op;
  problem.layout = layout;
  problem.heads_q = kHeads;
  problem.heads_kv = kKvHeads;
  problem.head_dim = problem.index_dim = kDim;
  problem.block_size = kBlock;
  problem.topk = kTopk;
  return problem;
}

constexpr msa_limits kLimits = {.struct_size = sizeof(msa_limits),
                                .max_threads = 2,
                                .max_batch = 2,
                                .max_tokens = kTokens,
                                .max_seqlen_q = kTokens,
                                .max_seqlen_k = kKeys};

class CApi : public ::testing::Test {
 protected:
  ~CApi() override {
    msa_plan_destroy(plan_);
    msa_threads_destroy(threads_);
  }

  /// Plans `problem` in both interfaces.
  void make_plan(const msa_problem& problem) {
    msa_plan_destroy(std::exchange(plan_, nullptr));
    ASSERT_EQ(msa_plan_create(&problem, &kLimits, "reference", &plan_), MSA_OK) << msa_last_error();
    ASSERT_STREQ(msa_plan_backend(plan_), "reference");
    const msa::Problem twin{.op = static_cast<msa::Op>(problem.op),
                            .layout = static_cast<msa::KvLayout>(problem.layout),
                            .heads_q = kHeads,
                            .heads_kv = kKvHeads,
                            .head_dim = kDim,
                            .index_dim = kDim,
                            .block_size = kBlock,
                            .topk = kTopk};
    const msa::Limits limits{.max_batch = 2,
                             .max_tokens = kTokens,
                             .max_seqlen_q = kTokens,
                             .max_seqlen_k = kKeys,
                             .max_threads = 2};
    const msa::Status status = msa::plan(twin, limits, &cpp_plan_, "reference");
    ASSERT_TRUE(status.ok()) << status.message();
    ASSERT_EQ(msa_plan_workspace_bytes(plan_), cpp_plan_.workspace_bytes);
    bytes_ = static_cast<size_t>(cpp_plan_.workspace_bytes);
    storage_.assign(bytes_ + 64, std::byte{0xa5});
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    workspace_ = storage_.data() + (64 - address % 64) % 64;
    if (threads_ == nullptr) {
      ASSERT_EQ(msa_threads_create(2, &threads_), MSA_OK) << msa_last_error();
    }
    queue_.threads = threads_;
  }

  template <class Params>
  void run_cpp(const Params& params) {
    const msa::Status status = msa::run(cpp_plan_, params, {workspace_, bytes_}, {});
    ASSERT_TRUE(status.ok()) << status.message();
  }

  /// The operators of training on what sparse attention made.
  void training_is_the_same(const Both& ids, const Out<float>& made_o, const Out<float>& made_lse);

  // Two sequences: 13 of 20 keys new, 8 of 20.
  const std::vector<int32_t> cu_q_ = {0, 13, 21}, cu_k_ = {0, 20, 40}, lens_ = {20, 20};
  const std::vector<int32_t> table_ = {5, 0, 3, 1, 6, 2};
  const Both cu_q{cu_q_.data(), MSA_I32, {3}}, cu_k{cu_k_.data(), MSA_I32, {3}},
      lens{lens_.data(), MSA_I32, {2}}, table{table_.data(), MSA_I32, {2, 3}};
  const msa_batch packed_{
      .struct_size = sizeof(msa_batch), .cu_seqlens_q = &cu_q.c, .cu_seqlens_k = &cu_k.c};
  const msa::Batch cpp_packed_{.cu_seqlens_q = cu_q.cpp, .cu_seqlens_k = cu_k.cpp};
  const msa_batch paged_{.struct_size = sizeof(msa_batch),
                         .cu_seqlens_q = &cu_q.c,
                         .seq_lens = &lens.c,
                         .page_table = &table.c};
  const msa::Batch cpp_paged_{
      .cu_seqlens_q = cu_q.cpp, .seq_lens = lens.cpp, .page_table = table.cpp};

  const std::vector<float> q_ = random_floats(kTokens * kHeads * kDim, 1),
                           k_ = random_floats(kKeys * kKvHeads * kDim, 2),
                           v_ = random_floats(kKeys * kKvHeads * kDim, 3),
                           qi_ = random_floats(kTokens * kKvHeads * kDim, 4),
                           ki_ = random_floats(kKeys * kDim, 5);
  const Both q{q_.data(), MSA_F32, {kTokens, kHeads, kDim}},
      k{k_.data(), MSA_F32, {kKeys, kKvHeads, kDim}},
      v{v_.data(), MSA_F32, {kKeys, kKvHeads, kDim}},
      qi{qi_.data(), MSA_F32, {kTokens, kKvHeads, kDim}}, ki{ki_.data(), MSA_F32, {kKeys, kDim}};

  msa_plan* plan_ = nullptr;
  msa_threads* threads_ = nullptr;
  msa_queue queue_{.struct_size = sizeof(msa_queue)};
  msa::Plan cpp_plan_;
  std::vector<std::byte> storage_;
  void* workspace_ = nullptr;
  size_t bytes_ = 0;
};

TEST_F(CApi, IndexBranchIsTheSame) {
  make_plan(small_problem(MSA_OP_INDEX_SCORES));
  Out<float> scores(MSA_F32, {kKvHeads, kTokens, kBlocks});
  const msa_index_scores_params scoring{.struct_size = sizeof scoring,
                                        .q_idx = &qi.c,
                                        .k_idx = &ki.c,
                                        .batch = &packed_,
                                        .scores = &scores.c};
  ASSERT_EQ(msa_run_index_scores(plan_, &scoring, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::IndexScoresParams{qi.cpp, ki.cpp, cpp_packed_, scores.cpp});
  scores.expect_same();

  make_plan(small_problem(MSA_OP_SELECT_BLOCKS));
  std::vector<int32_t> valid_values(kTokens);
  for (size_t t = 0; t < valid_values.size(); ++t)
    valid_values[t] = static_cast<int32_t>(t % kBlocks);
  const Both valid(valid_values.data(), MSA_I32, {kTokens});
  const Both given(scores.memory[0].data(), MSA_F32, {kKvHeads, kTokens, kBlocks});
  Out<int32_t> ids(MSA_I32, {kKvHeads, kTokens, kTopk});
  const msa_select_blocks_params selecting{.struct_size = sizeof selecting,
                                           .scores = &given.c,
                                           .num_valid_blocks = &valid.c,
                                           .block_ids = &ids.c};
  ASSERT_EQ(msa_run_select_blocks(plan_, &selecting, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::SelectBlocksParams{given.cpp, valid.cpp, ids.cpp});
  ids.expect_same();

  make_plan(small_problem(MSA_OP_INDEX_SELECT));
  Out<int32_t> fused(MSA_I32, {kKvHeads, kTokens, kTopk});
  Out<float> best(MSA_F32, {kKvHeads, kTokens, kTopk});
  const msa_index_select_params both{.struct_size = sizeof both,
                                     .q_idx = &qi.c,
                                     .k_idx = &ki.c,
                                     .batch = &packed_,
                                     .block_ids = &fused.c,
                                     .scores = &best.c};
  ASSERT_EQ(msa_run_index_select(plan_, &both, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::IndexSelectParams{qi.cpp, ki.cpp, cpp_packed_, fused.cpp, best.cpp});
  fused.expect_same();
  best.expect_same();
}

void CApi::training_is_the_same(const Both& ids, const Out<float>& made_o,
                                const Out<float>& made_lse) {
  const Both o(made_o.memory[0].data(), MSA_F32, {kTokens, kHeads, kDim}),
      lse(made_lse.memory[0].data(), MSA_F32, {kTokens, kHeads});
  make_plan(small_problem(MSA_OP_SPARSE_ATTENTION_BACKWARD));
  Out<float> dq(MSA_F32, {kTokens, kHeads, kDim}), dk(MSA_F32, {kKeys, kKvHeads, kDim}),
      dv(MSA_F32, {kKeys, kKvHeads, kDim});
  const msa_attention_backward_params backward{.struct_size = sizeof backward,
                                               .q = &q.c,
                                               .k = &k.c,
                                               .v = &v.c,
                                               .block_ids = &ids.c,
                                               .o = &o.c,
                                               .lse = &lse.c,
                                               .d_o = &q.c,
                                               .batch = &packed_,
                                               .dq = &dq.c,
                                               .dk = &dk.c,
                                               .dv = &dv.c};
  ASSERT_EQ(msa_run_attention_backward(plan_, &backward, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::AttentionBackwardParams{q.cpp,
                                       k.cpp,
                                       v.cpp,
                                       ids.cpp,
                                       o.cpp,
                                       lse.cpp,
                                       q.cpp,
                                       cpp_packed_,
                                       0,
                                       {},
                                       {},
                                       dq.cpp,
                                       dk.cpp,
                                       dv.cpp});
  dq.expect_same();
  dk.expect_same();
  dv.expect_same();

  make_plan(small_problem(MSA_OP_INDEX_LSE));
  Out<float> made_index(MSA_F32, {kTokens, kKvHeads});
  const msa_index_lse_params indexing{.struct_size = sizeof indexing,
                                      .q_idx = &qi.c,
                                      .k_idx = &ki.c,
                                      .block_ids = &ids.c,
                                      .batch = &packed_,
                                      .lse = &made_index.c};
  ASSERT_EQ(msa_run_index_lse(plan_, &indexing, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::IndexLseParams{qi.cpp, ki.cpp, ids.cpp, cpp_packed_, made_index.cpp});
  made_index.expect_same();

  make_plan(small_problem(MSA_OP_KL_BACKWARD));
  const Both index_lse(made_index.memory[0].data(), MSA_F32, {kTokens, kKvHeads});
  Out<float> dq_idx(MSA_F32, {kTokens, kKvHeads, kDim}), dk_idx(MSA_F32, {kKeys, kDim}),
      kl(MSA_F32, {kTokens, kKvHeads});
  const msa_kl_params learning{.struct_size = sizeof learning,
                               .softmax_scale = 0.4f,
                               .q = &q.c,
                               .k = &k.c,
                               .lse = &lse.c,
                               .q_idx = &qi.c,
                               .k_idx = &ki.c,
                               .index_lse = &index_lse.c,
                               .block_ids = &ids.c,
                               .batch = &packed_,
                               .dq_idx = &dq_idx.c,
                               .dk_idx = &dk_idx.c,
                               .kl = &kl.c};
  ASSERT_EQ(msa_run_kl(plan_, &learning, workspace_, bytes_, &queue_), MSA_OK) << msa_last_error();
  run_cpp(msa::KlParams{q.cpp,
                        k.cpp,
                        lse.cpp,
                        qi.cpp,
                        ki.cpp,
                        index_lse.cpp,
                        ids.cpp,
                        cpp_packed_,
                        0.4f,
                        {},
                        {},
                        dq_idx.cpp,
                        dk_idx.cpp,
                        kl.cpp});
  dq_idx.expect_same();
  dk_idx.expect_same();
  kl.expect_same();
}

TEST_F(CApi, AttentionIsTheSame) {
  make_plan(small_problem(MSA_OP_DENSE_ATTENTION));
  Out<float> o(MSA_F32, {kTokens, kHeads, kDim}), lse(MSA_F32, {kTokens, kHeads}),
      block_max(MSA_F32, {kHeads, kTokens, kBlocks});
  const msa_dense_attention_params dense{.struct_size = sizeof dense,
                                         .softmax_scale = 0.4f,
                                         .q = &q.c,
                                         .k = &k.c,
                                         .v = &v.c,
                                         .batch = &packed_,
                                         .o = &o.c,
                                         .lse = &lse.c,
                                         .block_max = &block_max.c};
  ASSERT_EQ(msa_run_dense_attention(plan_, &dense, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::DenseAttentionParams{q.cpp, k.cpp, v.cpp, cpp_packed_, 0.4f, o.cpp, lse.cpp,
                                    block_max.cpp});
  o.expect_same();
  lse.expect_same();
  block_max.expect_same();

  // Each token reads its sequence's first block and the local one of its last token.
  std::vector<int32_t> id_values(kKvHeads * kTokens * kTopk, -1);
  for (size_t row = 0; row < kKvHeads * kTokens; ++row) {
    id_values[row * kTopk] = 2;
    id_values[row * kTopk + 1] = 0;
  }
  const Both ids(id_values.data(), MSA_I32, {kKvHeads, kTokens, kTopk});
  make_plan(small_problem(MSA_OP_SPARSE_ATTENTION));
  Out<float> sparse_o(MSA_F32, {kTokens, kHeads, kDim}), sparse_lse(MSA_F32, {kTokens, kHeads});
  const msa_sparse_attention_params sparse{.struct_size = sizeof sparse,
                                           .q = &q.c,
                                           .k = &k.c,
                                           .v = &v.c,
                                           .block_ids = &ids.c,
                                           .batch = &packed_,
                                           .o = &sparse_o.c,
                                           .lse = &sparse_lse.c};
  ASSERT_EQ(msa_run_sparse_attention(plan_, &sparse, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::SparseAttentionParams{q.cpp, k.cpp, v.cpp, ids.cpp, cpp_packed_, 0, sparse_o.cpp,
                                     sparse_lse.cpp});
  sparse_o.expect_same();
  sparse_lse.expect_same();

  make_plan(small_problem(MSA_OP_BLOCK_MASS));
  const Both given_lse(lse.memory[0].data(), MSA_F32, {kTokens, kHeads});
  Out<float> mass(MSA_F32, {kKvHeads, kTokens, kBlocks});
  const msa_block_mass_params weighing{.struct_size = sizeof weighing,
                                       .softmax_scale = 0.4f,
                                       .q = &q.c,
                                       .k = &k.c,
                                       .lse = &given_lse.c,
                                       .batch = &packed_,
                                       .mass = &mass.c};
  ASSERT_EQ(msa_run_block_mass(plan_, &weighing, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::BlockMassParams{q.cpp, k.cpp, given_lse.cpp, cpp_packed_, 0.4f, mass.cpp});
  mass.expect_same();

  training_is_the_same(ids, sparse_o, sparse_lse);

  make_plan(small_problem(MSA_OP_BLOCK_LISTS));
  Out<int32_t> row_ptr(MSA_I32, {kKvHeads, 7}), entries(MSA_I32, {kKvHeads, kTokens * kTopk});
  const msa_block_lists_params inverting{.struct_size = sizeof inverting,
                                         .block_ids = &ids.c,
                                         .batch = &packed_,
                                         .row_ptr = &row_ptr.c,
                                         .entries = &entries.c};
  ASSERT_EQ(msa_run_block_lists(plan_, &inverting, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::BlockListsParams{ids.cpp, cpp_packed_, row_ptr.cpp, entries.cpp});
  row_ptr.expect_same();
  entries.expect_same();
}

TEST_F(CApi, MergeAndAppendAreTheSame) {
  make_plan(small_problem(MSA_OP_MERGE));
  const auto part_values = random_floats(3 * kTokens * kHeads * kDim, 6);
  const auto lse_values = random_floats(3 * kTokens * kHeads, 7);
  const Both parts(part_values.data(), MSA_F32, {3, kTokens, kHeads, kDim}),
      lses(lse_values.data(), MSA_F32, {3, kTokens, kHeads});
  Out<float> o(MSA_F32, {kTokens, kHeads, kDim}), lse(MSA_F32, {kTokens, kHeads});
  const msa_merge_params merging{.struct_size = sizeof merging,
                                 .o_parts = &parts.c,
                                 .lse_parts = &lses.c,
                                 .o = &o.c,
                                 .lse = &lse.c};
  ASSERT_EQ(msa_run_merge(plan_, &merging, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::MergeParams{parts.cpp, lses.cpp, o.cpp, lse.cpp});
  o.expect_same();
  lse.expect_same();

  make_plan(small_problem(MSA_OP_APPEND_PAGED, MSA_PAGED));
  const auto row_values = random_floats(kTokens * kKvHeads * kDim, 8);
  const auto index_row_values = random_floats(kTokens * kDim, 9);
  const Both rows(row_values.data(), MSA_F32, {kTokens, kKvHeads, kDim}),
      index_rows(index_row_values.data(), MSA_F32, {kTokens, kDim});
  Out<float> k_pages(MSA_F32, {kPages, kKvHeads, kBlock, kDim}),
      v_pages(MSA_F32, {kPages, kKvHeads, kBlock, kDim}),
      k_idx_pages(MSA_F32, {kPages, kBlock, kDim});
  for (Out<float>* out : {&k_pages, &v_pages, &k_idx_pages})
    std::copy(out->memory[0].begin(), out->memory[0].end(), out->memory[1].begin());
  const msa_append_paged_params appending{.struct_size = sizeof appending,
                                          .k = &rows.c,
                                          .v = &rows.c,
                                          .k_idx = &index_rows.c,
                                          .batch = &paged_,
                                          .k_pages = &k_pages.c,
                                          .v_pages = &v_pages.c,
                                          .k_idx_pages = &k_idx_pages.c};
  ASSERT_EQ(msa_run_append_paged(plan_, &appending, workspace_, bytes_, &queue_), MSA_OK)
      << msa_last_error();
  run_cpp(msa::AppendPagedParams{rows.cpp, rows.cpp, index_rows.cpp, cpp_paged_, k_pages.cpp,
                                 v_pages.cpp, k_idx_pages.cpp});
  k_pages.expect_same();
  v_pages.expect_same();
  k_idx_pages.expect_same();
  // Page 0 is logical block 1 of sequence 0: tokens 8..15, all of them new.
  EXPECT_EQ(k_idx_pages.memory[0][0], index_row_values[1 * kDim]);
}

TEST_F(CApi, ALayerIsTheSame) {
  make_plan(small_problem(MSA_OP_LAYER, MSA_PAGED));
  const auto k_values = random_floats(kPages * kKvHeads * kBlock * kDim, 10),
             v_values = random_floats(kPages * kKvHeads * kBlock * kDim, 11),
             ki_values = random_floats(kPages * kBlock * kDim, 12);
  const Both k_pages(k_values.data(), MSA_F32, {kPages, kKvHeads, kBlock, kDim}),
      v_pages(v_values.data(), MSA_F32, {kPages, kKvHeads, kBlock, kDim}),
      ki_pages(ki_values.data(), MSA_F32, {kPages, kBlock, kDim});
  Out<float> o(MSA_F32, {kTokens, kHeads, kDim}), lse(MSA_F32, {kTokens, kHeads});
  Out<int32_t> ids(MSA_I32, {kKvHeads, kTokens, kTopk});
  const msa_layer_params step{.struct_size = sizeof step,
                              .softmax_scale = 0.4f,
                              .q = &q.c,
                              .q_idx = &qi.c,
                              .k = &k_pages.c,
                              .v = &v_pages.c,
                              .k_idx = &ki_pages.c,
                              .batch = &paged_,
                              .o = &o.c,
                              .lse = &lse.c,
                              .block_ids = &ids.c};
  ASSERT_EQ(msa_run_layer(plan_, &step, workspace_, bytes_, &queue_), MSA_OK) << msa_last_error();
  run_cpp(msa::LayerParams{q.cpp, qi.cpp, k_pages.cpp, v_pages.cpp, ki_pages.cpp, cpp_paged_, 0.4f,
                           o.cpp, lse.cpp, ids.cpp});
  o.expect_same();
  lse.expect_same();
  ids.expect_same();
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
TEST_F(CApi, OldNamesMeanTheNewOnes) {
  make_plan(small_problem(MSA_OP_SPARSE_ATTENTION, MSA_PAGED));
  const int64_t bytes = msa_plan_workspace_bytes(plan_);
  const msa_problem old = small_problem(MSA_OP_SPARSE_DECODE, MSA_PAGED);
  msa_plan_destroy(std::exchange(plan_, nullptr));
  ASSERT_EQ(msa_plan_create(&old, &kLimits, "reference", &plan_), MSA_OK) << msa_last_error();
  EXPECT_EQ(msa_plan_workspace_bytes(plan_), bytes);
  EXPECT_EQ(MSA_OP_LAYER_DECODE, MSA_OP_LAYER);
  msa_limits limits{};
  limits.max_q_len = 3, limits.max_kv_len = 4;
  EXPECT_EQ(limits.max_seqlen_q, 3);
  EXPECT_EQ(limits.max_seqlen_k, 4);
  EXPECT_EQ(offsetof(msa_limits, max_seqlen_k), 32u);
  EXPECT_EQ(offsetof(msa_sparse_attention_params, ids), 32u);
  const msa_layer_decode_params none{.struct_size = sizeof none};
  EXPECT_EQ(msa_run_layer_decode(plan_, &none, workspace_, bytes_, &queue_), MSA_INVALID_ARGUMENT);
  EXPECT_STREQ(msa_last_error(), "batch: got NULL, expected a struct");
}
#pragma GCC diagnostic pop

TEST_F(CApi, OlderCallersGetDefaultsAndNewerOnesAnError) {
  msa_problem problem = small_problem(MSA_OP_INDEX_SELECT);
  problem.local_blocks = 9;  // above K, but behind the end of the older struct
  EXPECT_EQ(msa_plan_create(&problem, &kLimits, "reference", &plan_), MSA_INVALID_ARGUMENT);
  problem.struct_size = offsetof(msa_problem, local_blocks);
  EXPECT_EQ(msa_plan_create(&problem, &kLimits, "reference", &plan_), MSA_OK) << msa_last_error();

  problem.struct_size = sizeof problem + 8;
  EXPECT_EQ(msa_plan_create(&problem, &kLimits, "reference", &plan_), MSA_INVALID_ARGUMENT);
  const std::string message = msa_last_error();
  EXPECT_NE(message.find("problem.struct_size: got 64"), std::string::npos) << message;
  EXPECT_NE(message.find("56"), std::string::npos) << message;
  problem.struct_size = 0;
  EXPECT_EQ(msa_plan_create(&problem, &kLimits, "reference", &plan_), MSA_INVALID_ARGUMENT);
}

TEST_F(CApi, NoThreadLimitMeansAllOfTheMachine) {
  msa_threads* all = nullptr;
  ASSERT_EQ(msa_threads_create(0, &all), MSA_OK) << msa_last_error();
  msa_limits limits = kLimits;
  const msa_problem problem = small_problem(MSA_OP_SPARSE_ATTENTION);
  for (int32_t i = 0; i < msa_backend_count(); ++i) {
    if (msa_backend_usable(i) != MSA_OK || msa_backend_supports(i, &problem) != MSA_OK) continue;
    int64_t bytes[2];
    for (const bool named : {false, true}) {
      limits.max_threads = named ? msa_threads_count(all) : 0;
      msa_plan* plan = nullptr;
      ASSERT_EQ(msa_plan_create(&problem, &limits, msa_backend_name(i), &plan), MSA_OK);
      bytes[named] = msa_plan_workspace_bytes(plan);
      msa_plan_destroy(plan);
    }
    EXPECT_GT(bytes[0], 0) << msa_backend_name(i);
    EXPECT_EQ(bytes[0], bytes[1]) << msa_backend_name(i);
  }
  msa_threads_destroy(all);
}

TEST_F(CApi, ErrorsNameTheArgument) {
  const auto expect_error = [](msa_status status, msa_status expected, const std::string& part) {
    EXPECT_EQ(status, expected);
    EXPECT_NE(std::string(msa_last_error()).find(part), std::string::npos) << msa_last_error();
  };
  msa_problem problem = small_problem(MSA_OP_MERGE);
  expect_error(msa_plan_create(&problem, &kLimits, "abacus", &plan_), MSA_INVALID_ARGUMENT,
               "abacus");
  expect_error(msa_plan_create(nullptr, &kLimits, nullptr, &plan_), MSA_INVALID_ARGUMENT,
               "problem: got NULL");
  expect_error(msa_plan_create(&problem, &kLimits, nullptr, nullptr), MSA_INVALID_ARGUMENT, "out");
  problem.dtype = 256;  // would be f32 if it were cut to a byte
  expect_error(msa_plan_create(&problem, &kLimits, nullptr, &plan_), MSA_INVALID_ARGUMENT,
               "problem.dtype: got 256");
  EXPECT_EQ(plan_, nullptr);

  make_plan(small_problem(MSA_OP_MERGE));
  const auto lse_values = random_floats(3 * kTokens * kHeads, 7);
  Both lses(lse_values.data(), MSA_F32, {3, kTokens, kHeads});
  msa_merge_params merging{.struct_size = sizeof merging, .lse_parts = &lses.c};
  const auto run = [&] { return msa_run_merge(plan_, &merging, workspace_, bytes_, nullptr); };
  expect_error(run(), MSA_INVALID_ARGUMENT, "o_parts");
  lses.c.rank = 5;
  expect_error(run(), MSA_INVALID_ARGUMENT, "lse_parts.rank: got 5");
  lses.c.rank = 3;
  lses.c.dtype = -1;
  expect_error(run(), MSA_INVALID_ARGUMENT, "lse_parts.dtype: got -1");
  lses.c.dtype = MSA_F32;
  lses.c.device_kind = 7;
  expect_error(run(), MSA_INVALID_ARGUMENT, "lse_parts.device_kind: got 7");
  expect_error(msa_run_merge(nullptr, &merging, nullptr, 0, nullptr), MSA_INVALID_ARGUMENT,
               "plan: got NULL");
  expect_error(msa_run_merge(plan_, nullptr, nullptr, 0, nullptr), MSA_INVALID_ARGUMENT,
               "params: got NULL");
  expect_error(msa_threads_create(-1, &threads_), MSA_INVALID_ARGUMENT, "count: got -1");
}

TEST_F(CApi, LastErrorBelongsToItsThread) {
  EXPECT_EQ(msa_backend_name(-1), nullptr);
  ASSERT_STRNE(msa_last_error(), "");
  std::string elsewhere = "untouched";
  std::thread([&] { elsewhere = msa_last_error(); }).join();
  EXPECT_EQ(elsewhere, "");
}

TEST_F(CApi, BackendsAndCostsAreTheSame) {
  ASSERT_EQ(static_cast<size_t>(msa_backend_count()), msa::backends().size());
  const msa_problem problem = MSA_PROBLEM_INIT;
  for (int32_t i = 0; i < msa_backend_count(); ++i) {
    const msa::Backend& backend = *msa::backends()[static_cast<size_t>(i)];
    EXPECT_STREQ(msa_backend_name(i), backend.name);
    EXPECT_STREQ(msa_backend_requirement(i), backend.requirement);
    EXPECT_EQ(msa_backend_usable(i), static_cast<int>(backend.usable().code()));
    EXPECT_EQ(msa_backend_supports(i, &problem),
              static_cast<int>(backend.supports(msa::Problem{}).code()));
  }
  double flops = 0, bytes = 0, ratio = 0;
  ASSERT_EQ(msa_cost(&problem, 4096, 4096, &flops, &bytes), MSA_OK);
  const msa::Cost cost = msa::cost(msa::Problem{}, 4096, 4096);
  EXPECT_EQ(flops, cost.flops);
  EXPECT_EQ(bytes, cost.bytes);
  EXPECT_EQ(msa_cost(&problem, 2, 1, &flops, &bytes), MSA_INVALID_ARGUMENT);
  ASSERT_EQ(msa_paper_flop_ratio(&problem, 131072, &ratio), MSA_OK);
  EXPECT_DOUBLE_EQ(ratio, 16.0);
  EXPECT_EQ(msa_paper_flop_ratio(&problem, 0, &ratio), MSA_INVALID_ARGUMENT);
  EXPECT_STREQ(msa_version(), MSA_VERSION_STRING);
}

}  // namespace
