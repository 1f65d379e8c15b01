/* Sparse attention of 64 tokens, one head: each token reads its own block of 8 and the first one.
 * Without CMake: cc -std=c11 main.c $(pkg-config --cflags --libs msa) */
#include <msa/c_api.h>
#include <stdio.h>
#include <stdlib.h>

static float x[64 * 16], o[64 * 16];
static int32_t rows[2] = {0, 64}, ids[64 * 2];

int main(void) {
  for (int i = 0; i < 64 * 16; ++i) x[i] = (float)(i * i % 101) / 101 - 0.5f;
  for (int t = 0; t < 64; ++t) {
    ids[2 * t] = t / 8;
    ids[2 * t + 1] = t < 8 ? -1 : 0;
  }
  const msa_tensor qkv = msa_tensor_contiguous(x, MSA_F32, 3, (int64_t[]){64, 1, 16});
  const msa_tensor out = msa_tensor_contiguous(o, MSA_F32, 3, (int64_t[]){64, 1, 16});
  const msa_tensor list = msa_tensor_contiguous(ids, MSA_I32, 3, (int64_t[]){1, 64, 2});
  const msa_tensor lens = msa_tensor_contiguous(rows, MSA_I32, 1, (int64_t[]){2});
  const msa_batch batch = {
      .struct_size = sizeof batch, .cu_seqlens_q = &lens, .cu_seqlens_k = &lens};
  const msa_sparse_attention_params params = {.struct_size = sizeof params,
                                              .q = &qkv,
                                              .k = &qkv,
                                              .v = &qkv,
                                              .block_ids = &list,
                                              .batch = &batch,
                                              .o = &out};

  msa_problem problem = MSA_PROBLEM_INIT;
  problem.heads_q = problem.heads_kv = 1;
  problem.head_dim = 16;
  problem.block_size = 8;
  problem.topk = 2;
  const msa_limits limits = {.struct_size = sizeof limits,
                             .max_batch = 1,
                             .max_tokens = 64,
                             .max_seqlen_q = 64,
                             .max_seqlen_k = 64};

  msa_plan* plan = NULL;
  msa_status status = msa_plan_create(&problem, &limits, "auto", &plan);
  if (status == MSA_OK) {
    const size_t bytes = ((size_t)msa_plan_workspace_bytes(plan) / 64 + 1) * 64;
    void* memory = aligned_alloc(64, bytes);
    status = msa_run_sparse_attention(plan, &params, memory, bytes, NULL);
    free(memory);
  }
  if (status == MSA_OK) {
    printf("msa %s, %s: o[63] = %.6f\n", msa_version(), msa_plan_backend(plan), o[63 * 16]);
  } else {
    fprintf(stderr, "example: %s\n", msa_last_error());
  }
  msa_plan_destroy(plan);
  return status == MSA_OK ? 0 : 1;
}
