/* The operators in C: codes, arguments, calls. Printed by dev/c_ops.cc from
 * src/core/op_table.cc; ops.h says what each one computes. Included by c_api.h.
 */
/* clang-format off */
#pragma once

typedef enum msa_op {
  MSA_OP_INDEX_SCORES = 0,
  MSA_OP_SELECT_BLOCKS = 1,
  MSA_OP_INDEX_SELECT = 2,
  MSA_OP_SPARSE_ATTENTION = 3,
  MSA_OP_DENSE_ATTENTION = 5,
  MSA_OP_MERGE = 6,
  MSA_OP_BLOCK_LISTS = 7,
  MSA_OP_APPEND_PAGED = 8,
  MSA_OP_BLOCK_MASS = 9,
  MSA_OP_LAYER = 10,
  MSA_OP_SPARSE_ATTENTION_BACKWARD = 11,
  MSA_OP_DENSE_ATTENTION_BACKWARD = 12,
  MSA_OP_INDEX_LSE = 13,
  MSA_OP_KL_BACKWARD = 14,
  MSA_OP_KL_LOSS = 15,
  MSA_OP_MERGE_LISTS = 16,
  MSA_OP_SPARSE_DECODE MSA_DEPRECATED("MSA_OP_SPARSE_ATTENTION") = 4,
  MSA_OP_LAYER_DECODE MSA_DEPRECATED("MSA_OP_LAYER") = 10
} msa_op;

typedef enum msa_dtype {
  MSA_F32 = 0,
  MSA_BF16 = 1,
  MSA_F16 = 2,
  MSA_I32 = 3 /* metadata: ids, lengths, page tables */
} msa_dtype;

/* Sparse attention of MiniMax-M3 in f32 over packed keys on the CPU. */
#define MSA_PROBLEM_INIT \
  {.struct_size = sizeof(msa_problem), .op = 3, .dtype = 0, .layout = 0, .heads_q = 64, \
   .heads_kv = 4, .head_dim = 128, .index_dim = 128, .block_size = 128, .topk = 16, \
   .init_blocks = 0, .local_blocks = 1, .device_kind = 1, .device_id = 0}

/* scores[r,t,j] = max over visible tokens s of block j of q_idx[t,r] . k_idx[s] */
typedef struct msa_index_scores_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* q_idx; /* [T,Hi,Di] */
  const msa_tensor* k_idx; /* [S,Di] or [P,Bk,Di] */
  const msa_batch* batch;
  const msa_tensor* scores; /* out f32 [Hi,T,blocks] */
} msa_index_scores_params;
MSA_API msa_status msa_run_index_scores(const msa_plan* plan, const msa_index_scores_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* ids = forced blocks and best scores, ascending, -1 in the unused tail */
typedef struct msa_select_blocks_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* scores; /* f32 [Hi,T,blocks] */
  const msa_tensor* num_valid_blocks; /* i32 [T], optional */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* out i32 [Hi,T,K] */
} msa_select_blocks_params;
MSA_API msa_status msa_run_select_blocks(const msa_plan* plan, const msa_select_blocks_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* index_scores and select_blocks in one pass */
typedef struct msa_index_select_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* q_idx; /* [T,Hi,Di] */
  const msa_tensor* k_idx; /* [S,Di] or [P,Bk,Di] */
  const msa_batch* batch;
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* out i32 [Hi,T,K] */
  const msa_tensor* scores; /* out f32 [Hi,T,K], optional */
} msa_index_select_params;
MSA_API msa_status msa_run_index_select(const msa_plan* plan, const msa_index_select_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* o = softmax(q . k * scale) v over the visible tokens of the listed blocks */
typedef struct msa_sparse_attention_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* k; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_tensor* v; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* i32 [Hkv,T,K] */
  const msa_batch* batch;
  const msa_tensor* o; /* out [T,Hq,D] */
  const msa_tensor* lse; /* out f32 [T,Hq], optional */
} msa_sparse_attention_params;
MSA_API msa_status msa_run_sparse_attention(const msa_plan* plan, const msa_sparse_attention_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* the same with every visible block */
typedef struct msa_dense_attention_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* k; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_tensor* v; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_batch* batch;
  const msa_tensor* o; /* out [T,Hq,D] */
  const msa_tensor* lse; /* out f32 [T,Hq], optional */
  const msa_tensor* block_max; /* out f32 [Hq,T,blocks], optional */
} msa_dense_attention_params;
MSA_API msa_status msa_run_dense_attention(const msa_plan* plan, const msa_dense_attention_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* combines partial results over disjoint key sets */
typedef struct msa_merge_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* o_parts; /* [parts,T,Hq,D] */
  const msa_tensor* lse_parts; /* f32 [parts,T,Hq] */
  const msa_tensor* o; /* out [T,Hq,D] */
  const msa_tensor* lse; /* out f32 [T,Hq], optional */
} msa_merge_params;
MSA_API msa_status msa_run_merge(const msa_plan* plan, const msa_merge_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* block -> queries, as CSR per KV head; an entry is token*K + slot */
typedef struct msa_block_lists_params {
  uint32_t struct_size;
  uint32_t reserved;
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* i32 [Hkv,T,K] */
  const msa_batch* batch;
  const msa_tensor* row_ptr; /* out i32 [Hkv,NB+1] */
  const msa_tensor* entries; /* out i32 [Hkv,T*K] */
} msa_block_lists_params;
MSA_API msa_status msa_run_block_lists(const msa_plan* plan, const msa_block_lists_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* writes the new rows into their pages; k with v, and k_idx, are each optional */
typedef struct msa_append_paged_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* k; /* [T,Hkv,D], optional */
  const msa_tensor* v; /* [T,Hkv,D], optional */
  const msa_tensor* k_idx; /* [T,Di], optional */
  const msa_batch* batch;
  const msa_tensor* k_pages; /* out [P,Hkv,Bk,D], optional */
  const msa_tensor* v_pages; /* out [P,Hkv,Bk,D], optional */
  const msa_tensor* k_idx_pages; /* out [P,Bk,Di], optional */
} msa_append_paged_params;
MSA_API msa_status msa_run_append_paged(const msa_plan* plan, const msa_append_paged_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* attention mass of each block, mean over the heads of a group */
typedef struct msa_block_mass_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* k; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_tensor* lse; /* f32 [T,Hq] */
  const msa_batch* batch;
  const msa_tensor* mass; /* out f32 [Hkv,T,blocks] */
} msa_block_mass_params;
MSA_API msa_status msa_run_block_mass(const msa_plan* plan, const msa_block_mass_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* a sparse layer: index_select, then attention over what it chose */
typedef struct msa_layer_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* q_idx; /* [T,Hi,Di] */
  const msa_tensor* k; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_tensor* v; /* [S,Hkv,D] or [P,Hkv,Bk,D] */
  const msa_tensor* k_idx; /* [S,Di] or [P,Bk,Di] */
  const msa_batch* batch;
  const msa_tensor* o; /* out [T,Hq,D] */
  const msa_tensor* lse; /* out f32 [T,Hq], optional */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* out i32 [Hkv,T,K], optional */
} msa_layer_params;
MSA_API msa_status msa_run_layer(const msa_plan* plan, const msa_layer_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* dq, dk and dv of sparse attention, without ids of dense attention; packed keys */
typedef struct msa_attention_backward_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* k; /* [S,Hkv,D] */
  const msa_tensor* v; /* [S,Hkv,D] */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* i32 [Hkv,T,K] */
  const msa_tensor* o; /* [T,Hq,D] */
  const msa_tensor* lse; /* f32 [T,Hq] */
  const msa_tensor* d_o; /* [T,Hq,D] */
  const msa_batch* batch;
  const msa_tensor* row_ptr; /* i32 [Hkv,NB+1], optional */
  const msa_tensor* entries; /* i32 [Hkv,T*K], optional */
  const msa_tensor* dq; /* out [T,Hq,D] */
  const msa_tensor* dk; /* out [S,Hkv,D] */
  const msa_tensor* dv; /* out [S,Hkv,D] */
} msa_attention_backward_params;
MSA_API msa_status msa_run_attention_backward(const msa_plan* plan, const msa_attention_backward_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* LSE of the index logits over the listed blocks, without ids over all; packed keys */
typedef struct msa_index_lse_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* q_idx; /* [T,Hi,Di] */
  const msa_tensor* k_idx; /* [S,Di] */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* i32 [Hi,T,K], optional */
  const msa_batch* batch;
  const msa_tensor* lse; /* out f32 [T,Hi] */
} msa_index_lse_params;
MSA_API msa_status msa_run_index_lse(const msa_plan* plan, const msa_index_lse_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* the KL loss of the index branch, or its gradients; packed keys */
typedef struct msa_kl_params {
  uint32_t struct_size;
  float softmax_scale; /* 0 = 1/sqrt(D) */
  const msa_tensor* q; /* [T,Hq,D] */
  const msa_tensor* k; /* [S,Hkv,D] */
  const msa_tensor* lse; /* f32 [T,Hq] */
  const msa_tensor* q_idx; /* [T,Hi,Di] */
  const msa_tensor* k_idx; /* [S,Di] */
  const msa_tensor* index_lse; /* f32 [T,Hi] */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* i32 [Hkv,T,K], optional */
  const msa_batch* batch;
  const msa_tensor* row_ptr; /* i32 [Hkv,NB+1], optional */
  const msa_tensor* entries; /* i32 [Hkv,T*K], optional */
  const msa_tensor* dq_idx; /* out [T,Hi,Di] */
  const msa_tensor* dk_idx; /* out [S,Di] */
  const msa_tensor* kl; /* out f32 [T,Hi], optional */
} msa_kl_params;
MSA_API msa_status msa_run_kl(const msa_plan* plan, const msa_kl_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* the K best blocks of several lists, by score */
typedef struct msa_merge_lists_params {
  uint32_t struct_size;
  uint32_t reserved;
  const msa_tensor* scores_parts; /* f32 [parts,Hi,T,K] */
  const msa_tensor* block_ids_parts; /* i32 [parts,Hi,T,K] */
  MSA_RENAMED(const msa_tensor*, block_ids, ids); /* out i32 [Hi,T,K] */
  const msa_tensor* scores; /* out f32 [Hi,T,K], optional */
} msa_merge_lists_params;
MSA_API msa_status msa_run_merge_lists(const msa_plan* plan, const msa_merge_lists_params* params,
    void* workspace, size_t workspace_bytes, const msa_queue* queue);

/* The layer under its old name, until 0.3. */
typedef msa_layer_params msa_layer_decode_params;
MSA_API MSA_DEPRECATED("msa_run_layer") msa_status
    msa_run_layer_decode(const msa_plan* plan, const msa_layer_params* params, void* workspace,
                         size_t workspace_bytes, const msa_queue* queue);

/* X(NAME, first operator that takes the struct) for each of them. */
#define MSA_FOR_EACH_PARAMS(X) \
  X(index_scores, MSA_OP_INDEX_SCORES) \
  X(select_blocks, MSA_OP_SELECT_BLOCKS) \
  X(index_select, MSA_OP_INDEX_SELECT) \
  X(sparse_attention, MSA_OP_SPARSE_ATTENTION) \
  X(dense_attention, MSA_OP_DENSE_ATTENTION) \
  X(merge, MSA_OP_MERGE) \
  X(block_lists, MSA_OP_BLOCK_LISTS) \
  X(append_paged, MSA_OP_APPEND_PAGED) \
  X(block_mass, MSA_OP_BLOCK_MASS) \
  X(layer, MSA_OP_LAYER) \
  X(attention_backward, MSA_OP_SPARSE_ATTENTION_BACKWARD) \
  X(index_lse, MSA_OP_INDEX_LSE) \
  X(kl, MSA_OP_KL_BACKWARD) \
  X(merge_lists, MSA_OP_MERGE_LISTS)
