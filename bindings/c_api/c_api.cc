// The C interface: converts C structs to their C++ twins, calls the operator, keeps the message.
#include "msa/c_api.h"

#include <array>
#include <cstddef>
#include <cstring>
#include <new>
#include <system_error>

#include "core/check.h"
#include "core/op_table.h"
#include "core/text.h"
#include "msa/msa.h"

struct msa_threads {
  msa::Threads team;
};
struct msa_plan {
  msa::Plan plan;
};

namespace {

using msa::invalid;
using msa::Status;
using msa::StatusCode;
using msa::TensorView;

static_assert(static_cast<int>(StatusCode::kNumeric) == MSA_NUMERIC);
static_assert(static_cast<int>(msa::DType::kI32) == MSA_I32);
static_assert(static_cast<int>(msa::DeviceKind::kCUDA) == MSA_CUDA);
static_assert(static_cast<int>(msa::KvLayout::kPaged) == MSA_PAGED);
static_assert(msa::kMaxRank == MSA_MAX_RANK);

thread_local std::string last_error;
thread_local std::string last_reasons;  // of msa_plan_explain

msa_status report(const Status& status) {
  if (!status.ok()) last_error = status.message();
  return static_cast<msa_status>(status.code());
}

/// Calls body() -> Status. What the C++ library can throw (no memory, no thread) ends here.
template <class Body>
msa_status guarded(const Body& body) {
  try {
    return report(body());
  } catch (const std::bad_alloc&) {
    last_error = "out of memory";  // short enough for no string to need memory
    return MSA_UNAVAILABLE;
  } catch (const std::system_error& e) {
    return report(msa::error(StatusCode::kUnavailable, "threads: ", e.what()));
  }
}

/// Copies a caller's struct of its struct_size over `out`, which holds the defaults.
Status adopt(const char* name, const void* given, size_t known, size_t alignment, void* out) {
  if (given == nullptr) return invalid(name, ": got NULL, expected a struct");
  uint32_t size = 0;  // the first field of every struct
  std::memcpy(&size, given, sizeof size);
  if (size > known) {
    return invalid(name, ".struct_size: got ", size, ", version " MSA_VERSION_STRING " knows ",
                   known, " bytes; the caller's header is newer than the library");
  }
  if (size == 0 || size % alignment != 0) {
    return invalid(name, ".struct_size: got ", size, ", expected the sizeof of the struct, ",
                   known);
  }
  std::memcpy(out, given, size);
  return {};
}
template <class Struct>
Status adopt(const char* name, const Struct* given, Struct* out) {
  return adopt(name, given, sizeof(Struct), alignof(Struct), out);
}

Status device_from(const char* name, int32_t kind, int32_t id, msa::Device* out) {
  if (kind != 0 && kind != MSA_CPU && kind != MSA_CUDA)
    return invalid(name, ".device_kind: got ", kind, ", expected MSA_CPU (1) or MSA_CUDA (2)");
  out->kind = kind == MSA_CUDA ? msa::DeviceKind::kCUDA : msa::DeviceKind::kCPU;
  out->id = id;
  return {};
}

Status dtype_from(const char* name, int32_t dtype, msa::DType* out) {
  if (dtype < MSA_F32 || dtype > MSA_I32) {
    return invalid(name, ".dtype: got ", dtype,
                   ", expected MSA_F32 (0), MSA_BF16 (1), MSA_F16 (2) or MSA_I32 (3)");
  }
  *out = static_cast<msa::DType>(dtype);
  return {};
}

/// NULL stays "not given".
Status convert(const char* name, const msa_tensor* given, TensorView* out) {
  if (given == nullptr) return {};
  msa_tensor t{};
  MSA_TRY(adopt(name, given, &t));
  if (t.rank < 0 || t.rank > MSA_MAX_RANK)
    return invalid(name, ".rank: got ", t.rank, ", expected 0 to ", MSA_MAX_RANK);
  MSA_TRY(dtype_from(name, t.dtype, &out->dtype));
  MSA_TRY(device_from(name, t.device_kind, t.device_id, &out->device));
  out->data = t.data;
  out->rank = t.rank;
  for (size_t i = 0; i < static_cast<size_t>(t.rank); ++i) {
    out->shape[i] = t.shape[i];
    out->stride[i] = t.stride[i];
  }
  return {};
}

Status convert(const char* name, const msa_batch* given, msa::Batch* out) {
  msa_batch b{};
  MSA_TRY(adopt(name, given, &b));
  MSA_TRY(convert("cu_seqlens_q", b.cu_seqlens_q, &out->cu_seqlens_q));
  MSA_TRY(convert("cu_seqlens_k", b.cu_seqlens_k, &out->cu_seqlens_k));
  MSA_TRY(convert("seq_lens", b.seq_lens, &out->seq_lens));
  MSA_TRY(convert("page_table", b.page_table, &out->page_table));
  MSA_TRY(convert("q_offset", b.q_offset, &out->q_offset));
  MSA_TRY(convert("block_offset", b.block_offset, &out->block_offset));
  MSA_TRY(convert("page_rows", b.page_rows, &out->page_rows));
  out->causal = b.non_causal == 0;
  return {};
}

Status convert(const msa_problem* given, msa::Problem* out) {
  msa_problem p = MSA_PROBLEM_INIT;
  MSA_TRY(adopt("problem", given, &p));
  MSA_TRY(dtype_from("problem", p.dtype, &out->dtype));
  MSA_TRY(device_from("problem", p.device_kind, p.device_id, &out->device));
  if (p.layout != MSA_PACKED && p.layout != MSA_PAGED)
    return invalid("problem.layout: got ", p.layout, ", expected MSA_PACKED (0) or MSA_PAGED (1)");
  out->op = static_cast<msa::Op>(p.op);
  for (const msa::OldName& old : msa::old_names())
    if (p.op == old.code) out->op = old.op;
  out->layout = static_cast<msa::KvLayout>(p.layout);
  out->heads_q = p.heads_q;
  out->heads_kv = p.heads_kv;
  out->head_dim = p.head_dim;
  out->index_dim = p.index_dim;
  out->block_size = p.block_size;
  out->topk = p.topk;
  out->init_blocks = p.init_blocks;
  out->local_blocks = p.local_blocks;
  return {};
}

Status convert(const msa_limits* given, msa::Limits* out) {
  msa_limits l{};
  l.max_batch = out->max_batch;
  l.max_tokens = out->max_tokens;
  l.max_seqlen_q = out->max_seqlen_q;
  l.max_seqlen_k = out->max_seqlen_k;
  MSA_TRY(adopt("limits", given, &l));
  out->max_threads = l.max_threads;
  out->max_batch = l.max_batch;
  out->max_tokens = l.max_tokens;
  out->max_seqlen_q = l.max_seqlen_q;
  out->max_seqlen_k = l.max_seqlen_k;
  return {};
}

Status convert(const msa_queue* given, msa::Queue* out) {
  if (given == nullptr) return {};
  msa_queue q{};
  MSA_TRY(adopt("queue", given, &q));
  if (q.threads != nullptr) out->threads = &q.threads->team;
  out->cuda_stream = q.cuda_stream;
  return {};
}

// ---- arguments of operators ---------------------------------------------------------------------

/// A C struct of arguments: struct_size, softmax_scale (or nothing), then a pointer for each
/// argument in the order of the table.
Status convert(const msa::OpInfo& info, const void* given, msa::ParamsStorage* out) {
  struct {
    uint32_t struct_size;
    float softmax_scale;
    std::array<const void*, 16> pointers;
  } c{};
  const size_t count = info.arguments.size();
  MSA_TRY(adopt("params", given, offsetof(decltype(c), pointers) + count * sizeof(void*),
                alignof(void*), &c));
  std::byte* const to = out->memory;
  std::memcpy(to, info.defaults, info.size);
  for (size_t i = 0; i < count; ++i) {
    const msa::Argument& a = info.arguments[i];
    if (a.is_tensor())
      MSA_TRY(convert(a.name, static_cast<const msa_tensor*>(c.pointers[i]), &a.in(to)));
    else
      MSA_TRY(convert(a.name, static_cast<const msa_batch*>(c.pointers[i]), &info.batch_in(to)));
  }
  if (info.softmax_scale != msa::OpInfo::kNone)
    std::memcpy(to + info.softmax_scale, &c.softmax_scale, sizeof c.softmax_scale);
  return {};
}

/// What every msa_run_* does; `op` is the first of the operators that take these arguments.
msa_status run(msa::Op op, const msa_plan* plan, const void* params, void* workspace, size_t bytes,
               const msa_queue* queue) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return invalid("plan: got NULL, expected one made by msa_plan_create");
    msa::ParamsStorage converted;
    msa::Queue where;
    MSA_TRY(convert(msa::info_of(op), params, &converted));
    MSA_TRY(convert(queue, &where));
    return msa::run(plan->plan, {op, converted.memory}, {workspace, bytes}, where);
  });
}

Status backend_at(int32_t index, const msa::Backend** out) {
  const auto all = msa::backends();
  if (index < 0 || static_cast<size_t>(index) >= all.size())
    return invalid("backend index: got ", index, ", expected 0 to ", all.size() - 1);
  *out = all[static_cast<size_t>(index)];
  return {};
}

}  // namespace

const char* msa_last_error() { return last_error.c_str(); }
const char* msa_version() { return MSA_VERSION_STRING; }

msa_tensor msa_tensor_contiguous(const void* data, msa_dtype dtype, int32_t rank,
                                 const int64_t* shape) {
  msa_tensor tensor{};
  tensor.struct_size = sizeof(msa_tensor);
  tensor.dtype = dtype;
  tensor.data = const_cast<void*>(data);
  tensor.device_kind = MSA_CPU;
  tensor.rank = rank;
  if (rank < 0 || rank > MSA_MAX_RANK) return tensor;
  int64_t step = 1;
  for (int32_t i = rank - 1; i >= 0; --i) {
    tensor.shape[i] = shape[i];
    tensor.stride[i] = step;
    step *= shape[i];
  }
  return tensor;
}

int32_t msa_backend_count() { return static_cast<int32_t>(msa::backends().size()); }

const char* msa_backend_name(int32_t index) {
  const msa::Backend* backend = nullptr;
  const msa_status status = guarded([&] { return backend_at(index, &backend); });
  return status == MSA_OK ? backend->name : nullptr;
}

const char* msa_backend_requirement(int32_t index) {
  const msa::Backend* backend = nullptr;
  const msa_status status = guarded([&] { return backend_at(index, &backend); });
  return status == MSA_OK ? backend->requirement : nullptr;
}

msa_status msa_backend_usable(int32_t index) {
  return guarded([&]() -> Status {
    const msa::Backend* backend = nullptr;
    MSA_TRY(backend_at(index, &backend));
    return backend->usable();
  });
}

msa_status msa_backend_supports(int32_t index, const msa_problem* problem) {
  return guarded([&]() -> Status {
    const msa::Backend* backend = nullptr;
    msa::Problem converted;
    MSA_TRY(backend_at(index, &backend));
    MSA_TRY(convert(problem, &converted));
    MSA_TRY(msa::validate(converted));
    return backend->supports(converted);
  });
}

msa_status msa_cost(const msa_problem* problem, int64_t q_len, int64_t kv_len, double* flops,
                    double* bytes) {
  return guarded([&]() -> Status {
    msa::Problem converted;
    MSA_TRY(convert(problem, &converted));
    MSA_TRY(msa::validate(converted));
    if (q_len < 0 || q_len > kv_len)
      return invalid("q_len: got ", q_len, ", expected 0 to kv_len ", kv_len);
    if (flops == nullptr || bytes == nullptr) return invalid("flops, bytes: got NULL");
    const msa::Cost cost = msa::cost(converted, q_len, kv_len);
    *flops = cost.flops;
    *bytes = cost.bytes;
    return {};
  });
}

msa_status msa_paper_flop_ratio(const msa_problem* problem, int64_t context, double* ratio) {
  return guarded([&]() -> Status {
    msa::Problem converted;
    MSA_TRY(convert(problem, &converted));
    MSA_TRY(msa::validate(converted));
    if (context < 1) return invalid("context: got ", context, ", expected >= 1");
    if (ratio == nullptr) return invalid("ratio: got NULL");
    *ratio = msa::paper_flop_ratio(converted, context);
    return {};
  });
}

msa_status msa_threads_create(int32_t count, msa_threads** out) {
  return guarded([&]() -> Status {
    if (out == nullptr) return invalid("out: got NULL");
    if (count < 0) return invalid("count: got ", count, ", expected >= 0");
    *out = new msa_threads{msa::Threads(count)};
    return {};
  });
}

int32_t msa_threads_count(const msa_threads* threads) {
  return threads == nullptr ? 0 : threads->team.count();
}

void msa_threads_destroy(msa_threads* threads) { delete threads; }

msa_status msa_plan_create(const msa_problem* problem, const msa_limits* limits,
                           const char* backend, msa_plan** out) {
  return guarded([&]() -> Status {
    if (out == nullptr) return invalid("out: got NULL");
    msa::Problem converted;
    msa::Limits bounds;
    msa::Plan plan;
    MSA_TRY(convert(problem, &converted));
    MSA_TRY(convert(limits, &bounds));
    MSA_TRY(msa::plan(converted, bounds, &plan, backend == nullptr ? "auto" : backend));
    *out = new msa_plan{plan};
    return {};
  });
}

const char* msa_plan_backend(const msa_plan* plan) {
  return plan == nullptr ? nullptr : plan->plan.backend->name;
}

const char* msa_plan_kernel(const msa_plan* plan) {
  return plan == nullptr ? nullptr : plan->plan.kernel();
}

msa_status msa_plan_explain(const msa_plan* plan, const void* params, const char** kernel,
                            const char** reasons) {
  return guarded([&]() -> Status {
    if (plan == nullptr) return invalid("plan: got NULL, expected one made by msa_plan_create");
    if (kernel == nullptr || reasons == nullptr) return invalid("kernel, reasons: got NULL");
    const msa::Op op = msa::info_of(plan->plan.problem.op).params;
    msa::ParamsStorage converted;
    MSA_TRY(convert(msa::info_of(op), params, &converted));
    const msa::ParamsRef arguments{op, converted.memory};
    MSA_TRY(msa::check(plan->plan, arguments));
    last_reasons.clear();
    const msa::Kernel* found = msa::kernel_of(plan->plan, arguments, &last_reasons);
    *kernel = found != nullptr ? found->name : nullptr;
    *reasons = last_reasons.c_str();
    return {};
  });
}

int64_t msa_plan_workspace_bytes(const msa_plan* plan) {
  return plan == nullptr ? 0 : plan->plan.workspace_bytes;
}

void msa_plan_destroy(msa_plan* plan) { delete plan; }

#define MSA_DEFINE_RUN(name, op)                                                     \
  msa_status msa_run_##name(const msa_plan* plan, const msa_##name##_params* params, \
                            void* workspace, size_t bytes, const msa_queue* queue) { \
    return run(static_cast<msa::Op>(op), plan, params, workspace, bytes, queue);     \
  }
MSA_FOR_EACH_PARAMS(MSA_DEFINE_RUN)
#undef MSA_DEFINE_RUN

msa_status msa_run_layer_decode(const msa_plan* plan, const msa_layer_params* params,
                                void* workspace, size_t bytes, const msa_queue* queue) {
  return msa_run_layer(plan, params, workspace, bytes, queue);
}
