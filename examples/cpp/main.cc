// Sparse attention of 64 tokens, one head: each token reads its own block of 8 and the first one.
#include <msa/msa.h>

#include <cstdio>
#include <vector>

int main() {
  std::vector<float> x(64 * 16), o(64 * 16);
  std::vector<int32_t> rows = {0, 64}, ids;
  for (int i = 0; i < 64 * 16; ++i) x[i] = static_cast<float>(i * i % 101) / 101 - 0.5f;
  for (int t = 0; t < 64; ++t) ids.insert(ids.end(), {t / 8, t < 8 ? -1 : 0});
  const auto qkv = msa::TensorView::contiguous(x.data(), msa::DType::kF32, {64, 1, 16});
  const auto out = msa::TensorView::contiguous(o.data(), msa::DType::kF32, {64, 1, 16});
  const auto list = msa::TensorView::contiguous(ids.data(), msa::DType::kI32, {1, 64, 2});
  const auto lens = msa::TensorView::contiguous(rows.data(), msa::DType::kI32, {2});

  msa::Plan plan;
  msa::Status status =
      msa::plan({.heads_q = 1, .heads_kv = 1, .head_dim = 16, .block_size = 8, .topk = 2},
                {.max_tokens = 64, .max_seqlen_q = 64, .max_seqlen_k = 64}, &plan);
  if (status) {
    struct alignas(64) CacheLine {
      char bytes[64];
    };
    std::vector<CacheLine> memory(static_cast<size_t>(plan.workspace_bytes) / 64 + 1);
    const msa::Batch batch{.cu_seqlens_q = lens, .cu_seqlens_k = lens};
    status =
        msa::run(plan,
                 msa::SparseAttentionParams{
                     .q = qkv, .k = qkv, .v = qkv, .block_ids = list, .batch = batch, .o = out},
                 {memory.data(), memory.size() * 64});
  }
  if (!status) return std::fprintf(stderr, "example: %s\n", status.message().c_str()), 1;
  std::printf("msa %s, %s: o[63] = %.6f\n", MSA_VERSION_STRING, plan.backend->name, o[63 * 16]);
}
