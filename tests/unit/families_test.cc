// What the tuned CUDA families take, asked on any machine: no device, no CUDA toolkit.
#include <gtest/gtest.h>

#include <cstddef>
#include <string>

#include "cuda/sm90/backward/family.h"
#include "cuda/sm90/decode/family.h"
#include "cuda/sm90/dense/family.h"
#include "cuda/sm90/index/family.h"
#include "cuda/sm90/kl/family.h"
#include "cuda/sm90/prefill/family.h"

namespace msa::cuda::sm90 {
namespace {

using Fits = Refusal (*)(const Problem&, const Limits&);

/// The text of a refusal, "" where there is none.
std::string text(const Refusal& refusal) { return refusal ? refusal.text() : ""; }

/// MiniMax-M3 in bf16.
Problem m3(Op op, KvLayout layout = KvLayout::kPacked) {
  return {.op = op, .dtype = DType::kBF16, .layout = layout};
}

TEST(Families, TakeTheShapeOfM3) {
  const KvLayout paged = KvLayout::kPaged;
  EXPECT_EQ(text(prefill::fits(m3(Op::kSparseAttention), {})), "");
  EXPECT_EQ(text(decode::fits(m3(Op::kSparseAttention, paged), {})), "");
  EXPECT_EQ(text(decode::fits_index(m3(Op::kIndexSelect, paged), {})), "");
  EXPECT_EQ(text(decode::fits_layer(m3(Op::kLayer, paged), {})), "");
  EXPECT_EQ(text(dense::fits(m3(Op::kDenseAttention), {})), "");
  for (Op op : {Op::kIndexScores, Op::kSelectBlocks, Op::kIndexSelect})
    EXPECT_EQ(text(index::fits(m3(op), {})), "");
  for (Op op : {Op::kSparseAttentionBackward, Op::kDenseAttentionBackward})
    EXPECT_EQ(text(backward::fits(m3(op), {})), "");
  for (Op op : {Op::kIndexLse, Op::kKlBackward, Op::kKlLoss})
    EXPECT_EQ(text(kl::fits(m3(op), {})), "");
}

TEST(Families, NameWhatTheyRefuse) {
  struct Case {
    Fits fits;
    Op op;
    void (*change)(Problem&);
    const char* refusal;
  };
  const Case cases[] = {
      {prefill::fits, Op::kSparseAttention, [](Problem& p) { p.dtype = DType::kF16; },
       "dtype: got f16, supported: bf16"},
      {prefill::fits, Op::kSparseAttention, [](Problem& p) { p.heads_q = 16; },
       "heads_q / heads_kv: got 4, supported: 8 and 16"},
      {prefill::fits, Op::kSparseAttention, [](Problem& p) { p.topk = 17; },
       "topk: got 17, supported: 1..16"},
      {prefill::fits, Op::kSparseAttention, [](Problem& p) { p.block_size = 64; },
       "block_size: got 64, supported: 128"},
      {decode::fits, Op::kSparseAttention, [](Problem&) {},
       "layout: got packed keys, supported: paged ones"},
      {decode::fits, Op::kSparseAttention,
       [](Problem& p) { p.layout = KvLayout::kPaged, p.topk = 33; },
       "topk: got 33, supported: 1..32"},
      {decode::fits_layer, Op::kLayer,
       [](Problem& p) { p.layout = KvLayout::kPaged, p.index_dim = 64; },
       "index_dim: got 64, supported: 128"},
      {dense::fits, Op::kDenseAttention, [](Problem& p) { p.head_dim = 64; },
       "head_dim: got 64, supported: 128"},
      {dense::fits, Op::kDenseAttention,
       [](Problem& p) { p.layout = KvLayout::kPaged, p.block_size = 64; },
       "block_size: got 64, supported: 128 with paged keys"},
      {index::fits, Op::kIndexSelect, [](Problem& p) { p.heads_kv = 3; },
       "heads_kv: got 3, supported: powers of two up to 64"},
      {index::fits, Op::kSelectBlocks, [](Problem& p) { p.topk = 40; },
       "topk: got 40, supported: 1..32"},
      {backward::fits, Op::kSparseAttentionBackward, [](Problem& p) { p.topk = 17; },
       "topk: got 17, supported: 1..16"},
      {kl::fits, Op::kKlLoss, [](Problem& p) { p.heads_q = 4; },
       "heads_q / heads_kv: got 1, supported: 8 and 16"},
      {kl::fits, Op::kIndexLse, [](Problem& p) { p.index_dim = 96; },
       "index_dim: got 96, supported: 128"},
  };
  for (const Case& c : cases) {
    Problem problem = m3(c.op);
    c.change(problem);
    EXPECT_EQ(text(c.fits(problem, {})), c.refusal);
  }
}

TEST(Families, DecodeChoosesForFewRows) {
  const Problem problem = m3(Op::kIndexSelect, KvLayout::kPaged);
  EXPECT_EQ(text(decode::fits_index(problem, {.max_seqlen_q = 4})), "");
  EXPECT_EQ(text(decode::fits_index(problem, {.max_seqlen_q = 5})),
            "max_seqlen_q * heads_kv: got 20, supported: 1..16");
  EXPECT_EQ(text(decode::fits_index(problem, {.max_batch = 1025})),
            "max_batch: got 1025, supported: 1..1024");
  EXPECT_EQ(text(decode::fits_index(problem, {.max_seqlen_k = (1 << 20) + 1})),
            "max_seqlen_k: got 1048577, supported: up to 2^20");
}

TEST(Families, AStepOfDecodingIsALimit) {
  const Problem packed = m3(Op::kSparseAttention), paged = m3(packed.op, KvLayout::kPaged);
  const Limits step{.max_seqlen_q = 16}, longer{.max_seqlen_q = 17};
  EXPECT_EQ(text(decode::fits(paged, step)), "");
  EXPECT_EQ(text(decode::fits(paged, longer)), "max_seqlen_q: got 17, supported: 1..16");
  EXPECT_EQ(text(prefill::fits(paged, longer)), "");
  EXPECT_EQ(text(prefill::fits(packed, step)), "");
  EXPECT_EQ(text(prefill::fits(paged, step)),
            "max_seqlen_q: got 16, supported: 17 and more with paged keys");
}

TEST(Families, LeaveCallsToThePlainKernels) {
  alignas(16) static std::byte memory[64];
  const auto rows = [](int shift) {
    return TensorView::contiguous(memory + shift, DType::kBF16, {1, 16, 128});
  };
  const Plan plan{.problem = m3(Op::kDenseAttention)};
  DenseAttentionParams dense{.q = rows(0), .k = rows(0), .v = rows(0), .o = rows(0)};
  EXPECT_EQ(text(dense::takes(plan, dense)), "");
  dense.softmax_scale = -1;
  EXPECT_EQ(text(dense::takes(plan, dense)), "softmax_scale: got a negative one, supported: >= 0");
  dense.softmax_scale = 0;
  dense.v = rows(2);
  EXPECT_EQ(text(dense::takes(plan, dense)),
            "v: got rows that do not begin at multiples of 16 bytes, supported: addresses and "
            "strides of 16 bytes");
  IndexSelectParams select{.q_idx = rows(0), .k_idx = rows(0)};
  EXPECT_EQ(text(index::takes(plan, select)), "");
  select.batch.causal = false;
  EXPECT_EQ(text(index::takes(plan, select)), "causal: got false, supported: true");
}

}  // namespace
}  // namespace msa::cuda::sm90
