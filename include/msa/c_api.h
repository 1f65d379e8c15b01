/* The C interface (C11) of the operators that ops.h documents; shape letters: problem.h.
 *
 * msa_problem -> msa_plan_create -> msa_run_NAME; examples/c has a whole program.
 *
 * - struct_size, the first field of every struct, is its sizeof. A smaller value is an older
 * caller, whose missing fields take their defaults; a larger one is an error.
 * - Zero is the default of every optional field, a NULL tensor means "argument not given".
 * - The library keeps no pointer to a caller's struct or tensor after a call.
 * - A plan may be used by many threads at once, msa_threads by one call at a time.
 */
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "msa/export.h"
#include "msa/version.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Outcome of a call; the codes of msa::StatusCode. Anything but MSA_OK sets msa_last_error(). */
typedef enum msa_status {
  MSA_OK = 0,
  MSA_INVALID_ARGUMENT = 1, /* an argument breaks the contract of the operator */
  MSA_UNSUPPORTED = 2,      /* legal, but no (or not this) backend does it */
  MSA_UNAVAILABLE = 3,      /* a backend, device or resource is not there */
  MSA_IO = 4,               /* a file cannot be read or written */
  MSA_INTERNAL = 5,         /* a defect of this library */
  MSA_NUMERIC = 6           /* valid inputs, but a result that is no finite number */
} msa_status;

/* One line about the last call of this thread that failed: argument, given value, supported values.
 * Valid until the next failing call of this thread; "" before the first. Never NULL. */
MSA_API const char* msa_last_error(void);

/* Version of the library in use, "0.1.0"; version.h has that of the headers. */
MSA_API const char* msa_version(void);

/* As in DLPack; 0 counts as MSA_CPU. */
typedef enum msa_device_kind { MSA_CPU = 1, MSA_CUDA = 2 } msa_device_kind;

/* As KvLayout of problem.h. */
typedef enum msa_kv_layout { MSA_PACKED = 0, MSA_PAGED = 1 } msa_kv_layout;

#define MSA_MAX_RANK 4

/* A view of caller memory: data[i0*stride[0] + i1*stride[1] + ...]; shape and stride count
 * elements. The innermost stride is 1 (or its extent 1), every other stride is free. */
typedef struct msa_tensor {
  uint32_t struct_size;
  int32_t dtype; /* msa_dtype */
  void* data;
  int32_t device_kind; /* msa_device_kind */
  int32_t device_id;
  int32_t rank; /* 0..MSA_MAX_RANK; 0 = not given */
  int32_t reserved;
  int64_t shape[MSA_MAX_RANK];
  int64_t stride[MSA_MAX_RANK];
} msa_tensor;

/* Which rows belong to which sequence; all i32. */
typedef struct msa_batch {
  uint32_t struct_size;
  int32_t non_causal;             /* 1: every key is visible to every query */
  const msa_tensor* cu_seqlens_q; /* [B+1] */
  const msa_tensor* cu_seqlens_k; /* [B+1], packed keys */
  const msa_tensor* seq_lens;     /* [B], paged keys */
  const msa_tensor* page_table;   /* [B,max_pages], paged keys; any strides; see page_rows */
  const msa_tensor* q_offset;     /* [B], optional: position of the first query */
  const msa_tensor* block_offset; /* [B], optional: first block of this shard of the keys */
  const msa_tensor* page_rows;    /* [B], optional: b's row of page_table [rows,max_pages], or its
                                     first entry in page_table [entries] */
} msa_batch;

/* The static description of an operator call, MSA_PROBLEM_INIT by default; fields that the operator
 * does not use are ignored. */
typedef struct msa_problem {
  uint32_t struct_size;
  int32_t op;           /* msa_op */
  int32_t dtype;        /* msa_dtype of q, k, v and the index keys */
  int32_t layout;       /* msa_kv_layout */
  int32_t heads_q;      /* Hq, a multiple of heads_kv */
  int32_t heads_kv;     /* Hkv, and Hi */
  int32_t head_dim;     /* D */
  int32_t index_dim;    /* Di */
  int32_t block_size;   /* Bk, tokens; also the page size */
  int32_t topk;         /* K >= 1 */
  int32_t init_blocks;  /* init_blocks + local_blocks <= K */
  int32_t local_blocks; /* forced blocks at the query's end */
  int32_t device_kind;  /* msa_device_kind */
  int32_t device_id;
} msa_problem;

/* Upper bounds of the calls that a plan will serve. */
typedef struct msa_limits {
  uint32_t struct_size;
  int32_t max_threads; /* CPU threads a queue may bring; 0 = all of the machine's */
  int64_t max_batch;   /* B */
  int64_t max_tokens;  /* T */
  MSA_RENAMED(int64_t, max_seqlen_q, max_q_len);  /* query tokens of one sequence */
  MSA_RENAMED(int64_t, max_seqlen_k, max_kv_len); /* its key tokens, the new ones included */
} msa_limits;

/* ---- backends ------------------------------------------------------------------------------- */

/* Backends of this build, usable or not, highest priority first. */
MSA_API int32_t msa_backend_count(void);
/* Name and requirement of backend `index` ("avx2", "AVX2, FMA and F16C"); NULL outside
 * 0..msa_backend_count()-1, with msa_last_error(). Static strings. */
MSA_API const char* msa_backend_name(int32_t index);
MSA_API const char* msa_backend_requirement(int32_t index);
/* MSA_OK, or MSA_UNAVAILABLE with the reason in msa_last_error(). */
MSA_API msa_status msa_backend_usable(int32_t index);
/* MSA_OK, or MSA_UNSUPPORTED with the field, its value and what this backend supports. */
MSA_API msa_status msa_backend_supports(int32_t index, const msa_problem* problem);

/* ---- cost ----------------------------------------------------------------------------------- */

/* FLOPs (a multiply-add counts 2, exact on visible pairs) and compulsory bytes of one sequence of
 * kv_len tokens whose last q_len are new; 0 <= q_len <= kv_len. */
MSA_API msa_status msa_cost(const msa_problem* problem, int64_t q_len, int64_t kv_len,
                            double* flops, double* bytes);
/* The paper's closed form of dense over MSA FLOPs at `context` tokens; see paper_flop_ratio. */
MSA_API msa_status msa_paper_flop_ratio(const msa_problem* problem, int64_t context, double* ratio);

/* ---- plans and queues ----------------------------------------------------------------------- */

/* A team of CPU threads. */
typedef struct msa_threads msa_threads;
/* `count` workers, the calling thread among them; 0 = all of the machine's; below 0 is an error.
 * MSA_UNAVAILABLE when the system gives no thread. */
MSA_API msa_status msa_threads_create(int32_t count, msa_threads** out);
MSA_API int32_t msa_threads_count(const msa_threads* threads); /* 0 for NULL */
MSA_API void msa_threads_destroy(msa_threads* threads);        /* NULL is fine */

/* An operator bound to a backend. */
typedef struct msa_plan msa_plan;
/* Binds problem to a backend: "auto" (or NULL) takes the best one that can, or the one that the
 * environment variable MSA_BACKEND names; a name forces it. On error *out is left alone. */
MSA_API msa_status msa_plan_create(const msa_problem* problem, const msa_limits* limits,
                                   const char* backend, msa_plan** out);
MSA_API const char* msa_plan_backend(const msa_plan* plan);     /* its name; NULL for NULL */
MSA_API const char* msa_plan_kernel(const msa_plan* plan);      /* its best one: "sm90/dense" */
MSA_API int64_t msa_plan_workspace_bytes(const msa_plan* plan); /* for any call; 0 for NULL */
MSA_API void msa_plan_destroy(msa_plan* plan);                  /* NULL is fine */

/* Where the work is enqueued. A NULL queue is the calling thread alone. */
typedef struct msa_queue {
  uint32_t struct_size;
  uint32_t reserved;
  msa_threads* threads; /* CPU; NULL = the calling thread alone */
  void* cuda_stream;    /* CUDA */
} msa_queue;

/* ---- operators ------------------------------------------------------------------------------
 * c_ops.h declares a struct msa_NAME_params for each kind of arguments, and
 *   msa_status msa_run_NAME(plan, params, workspace, workspace_bytes, queue)
 * which checks every argument, then computes; on the CPU it returns when done. `workspace` is
 * 64-byte aligned (256 on CUDA) and at least msa_plan_workspace_bytes long.
 * Errors: MSA_INVALID_ARGUMENT with argument, given and expected; the outputs are then untouched.
 */
#include "msa/c_ops.h"

/* The contiguous (row-major) CPU view of `rank` extents over data; a rank outside 0..MSA_MAX_RANK
 * is kept as given and refused by the call that gets the tensor. */
MSA_API msa_tensor msa_tensor_contiguous(const void* data, msa_dtype dtype, int32_t rank,
                                         const int64_t* shape);

/* The kernel that a call of these arguments runs on, msa_plan_kernel unless it leaves them to
 * another one, and why ("" where it does not). `params` is the plan's operator's struct. *reasons
 * is valid until the next such call of this thread. Errors: those of msa_run_NAME. */
MSA_API msa_status msa_plan_explain(const msa_plan* plan, const void* params, const char** kernel,
                                    const char** reasons);

#ifdef __cplusplus
}
#endif
