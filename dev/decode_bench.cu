// Decode: sparse_decode and the one-call layer against naive kernels, then their times.
//
//   decode_bench            checks, then every row of the table
//   decode_bench check      the checks alone
//   decode_bench time       the table alone
//
// Times are medians of 20 replays of a CUDA graph that goes through several caches, together larger
// than twice the L2; a row shows its bytes, their time at the read bandwidth of the machine, and
// the fraction of it that was reached.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "../src/cuda/sm90/decode/launch.cu"  // the kernels too, to time them one by one

namespace bench {

using namespace msa;
using namespace msa::cuda;
using namespace msa::cuda::sm90::decode;
using bf16 = __nv_bfloat16;

#define CUDA_OK(call)                                                           \
  do {                                                                          \
    const cudaError_t result = (call);                                          \
    if (result != cudaSuccess) {                                                \
      printf("line %d: %s: %s\n", __LINE__, #call, cudaGetErrorString(result)); \
      exit(1);                                                                  \
    }                                                                           \
  } while (false)

void ok(const Status& status) {
  if (status.ok()) return;
  printf("error: %s\n", status.message().c_str());
  exit(1);
}

// ---- data
// ------------------------------------------------------------------------------------------

__global__ void fill_random(bf16* data, int64_t count, uint32_t seed, float scale) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    uint64_t x =
        (static_cast<uint64_t>(i) + 1) * 0x9E3779B97F4A7C15ULL + seed * 0xD1B54A32D192ED03ULL;
    x ^= x >> 31, x *= 0xBF58476D1CE4E5B9ULL, x ^= x >> 27, x *= 0x94D049BB133111EBULL,
        x ^= x >> 31;
    float sum = 0;  // of four uniform numbers: nearly normal
    for (int p = 0; p < 4; ++p)
      sum += static_cast<float>((x >> (16 * p)) & 0xffff) / 65536.F - 0.5F;
    data[i] = __float2bfloat16(sum * 1.732F * scale);
  }
}

template <class T>
T* device_array(size_t count) {
  T* data = nullptr;
  CUDA_OK(cudaMalloc(&data, std::max<size_t>(count, 1) * sizeof(T)));
  return data;
}
template <class T>
T* to_device(const std::vector<T>& host) {
  T* data = device_array<T>(host.size());
  CUDA_OK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}
template <class T>
std::vector<T> to_host(const T* data, size_t count) {
  std::vector<T> host(count);
  CUDA_OK(cudaMemcpy(host.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}
bf16* random_array(int64_t count, uint32_t seed, float scale = 1) {
  bf16* data = device_array<bf16>(count);
  fill_random<<<1024, 256>>>(data, count, seed, scale);
  CUDA_OK(cudaGetLastError());
  return data;
}
TensorView on_device(TensorView view) {
  view.device = {DeviceKind::kCUDA, 0};
  return view;
}
TensorView view_of(const void* data, DType type, std::initializer_list<int64_t> shape) {
  return on_device(TensorView::contiguous(data, type, shape));
}

/// Pages shared by all caches of a run.
struct Pool {
  int64_t pages;
  int heads;
  bf16 *k, *v, *k_idx;

  Pool(int64_t pages, int heads) : pages(pages), heads(heads) {
    k = random_array(pages * heads * kBlock * kDim, 1);
    v = random_array(pages * heads * kBlock * kDim, 2);
    k_idx = random_array(pages * kBlock * kDim, 3);
  }
  ~Pool() { cudaFree(k), cudaFree(v), cudaFree(k_idx); }
};

struct Lengths {
  std::vector<int32_t> q, kv;
  int padded_rows = 0;
};

/// One batch over the pool with all its tensors.
struct Batched {
  int tokens, sequences, topk, heads, group;
  int64_t max_kv;
  std::vector<int32_t> cu, kv, table;
  int64_t columns;
  Batch batch;
  bf16 *q, *q_idx;
  void* o;
  float* lse;
  int32_t* ids;
  std::vector<void*> owned;
  SparseAttentionParams attention;
  IndexSelectParams index;
  Plan attention_plan, index_plan;
  float* workspace;

  template <class T>
  T* own(T* pointer) {
    owned.push_back(pointer);
    return pointer;
  }

  /// A layer whose cache is the pool's pages from `first_page` on, in the order of the permutation
  /// `pages`; `model` is a layer of the same model, which has the same lengths and tables.
  Batched(const Pool& pool, int64_t first_page, const std::vector<int32_t>& pages,
          const Lengths& lengths, int group, int topk, DType o_type, uint32_t seed,
          const Batched* model = nullptr)
      : topk(topk), heads(pool.heads), group(group), kv(lengths.kv) {
    sequences = static_cast<int>(lengths.q.size());
    cu.push_back(0);
    for (int n : lengths.q) cu.push_back(cu.back() + n);
    tokens = cu.back() + lengths.padded_rows;
    max_kv = std::max(1, *std::max_element(kv.begin(), kv.end()));
    columns = (max_kv + kBlock - 1) / kBlock;
    table.assign(sequences * columns, -7);
    for (int64_t b = 0, next = 0; b < sequences; ++b)
      for (int64_t j = 0; j * kBlock < kv[b]; ++j) table[b * columns + j] = pages[next++];
    q = own(random_array(int64_t{tokens} * heads * group * kDim, seed, 1.5F));
    q_idx = own(random_array(int64_t{tokens} * heads * kDim, seed + 1));
    const int64_t outputs = int64_t{tokens} * heads * group;
    o = own(device_array<float>(outputs * kDim));
    lse = own(device_array<float>(outputs));
    CUDA_OK(cudaMemset(o, 0xff, outputs * kDim * 4));
    CUDA_OK(cudaMemset(lse, 0xff, outputs * 4));
    ids = own(device_array<int32_t>(int64_t{heads} * tokens * topk));

    batch.cu_seqlens_q = view_of(own(to_device(cu)), DType::kI32, {sequences + 1});
    batch.seq_lens = view_of(own(to_device(kv)), DType::kI32, {sequences});
    batch.page_table = view_of(own(to_device(table)), DType::kI32, {sequences, columns});
    if (model != nullptr) batch = model->batch;
    const auto count = static_cast<int64_t>(pages.size());
    const int64_t skip = first_page * kBlock * kDim;
    attention.q = view_of(q, DType::kBF16, {tokens, heads * group, kDim});
    attention.k = view_of(pool.k + skip * heads, DType::kBF16, {count, heads, kBlock, kDim});
    attention.v = view_of(pool.v + skip * heads, DType::kBF16, {count, heads, kBlock, kDim});
    attention.ids = view_of(ids, DType::kI32, {heads, tokens, topk});
    attention.batch = batch;
    attention.o = view_of(o, o_type, {tokens, heads * group, kDim});
    attention.lse = view_of(lse, DType::kF32, {tokens, heads * group});
    index.q_idx = view_of(q_idx, DType::kBF16, {tokens, heads, kDim});
    index.k_idx = view_of(pool.k_idx + skip, DType::kBF16, {count, kBlock, kDim});
    index.batch = batch;
    index.ids = attention.ids;

    Problem& p = attention_plan.problem;
    p.op = Op::kSparseDecode;
    p.dtype = DType::kBF16;
    p.layout = KvLayout::kPaged;
    p.heads_q = heads * group;
    p.heads_kv = heads;
    p.topk = topk;
    p.device = {DeviceKind::kCUDA, 0};
    attention_plan.limits = {.max_batch = sequences,
                             .max_tokens = tokens,
                             .max_q_len = *std::max_element(lengths.q.begin(), lengths.q.end()),
                             .max_kv_len = max_kv};
    index_plan = attention_plan;
    index_plan.problem.op = Op::kIndexSelect;
    const int64_t bytes = workspace_bytes(index_plan.problem, index_plan.limits);
    workspace = own(device_array<float>(bytes / 4));
    CUDA_OK(cudaMemset(workspace, 0xff, bytes));
  }
  Batched(const Batched&) = delete;
  ~Batched() {
    for (void* pointer : owned) cudaFree(pointer);
  }

  int blocks_seen(int t) const {  // by row t
    for (int b = 0; b < sequences; ++b) {
      if (t >= cu[b] && t < cu[b + 1]) {
        const int visible = std::clamp(kv[b] - (cu[b + 1] - cu[b]) + (t - cu[b]) + 1, 0, kv[b]);
        return (visible + kBlock - 1) / kBlock;
      }
    }
    return 0;
  }

  /// Random lists in random order; `same` gives all tokens of a sequence one list.
  void random_lists(uint32_t seed, bool same = false) {
    std::mt19937 engine(seed);
    std::vector<int32_t> lists(size_t(heads) * tokens * topk, -1);
    for (int h = 0; h < heads; ++h) {
      for (int t = 0; t < tokens; ++t) {
        const int blocks = blocks_seen(t);
        int32_t* list = &lists[(size_t(h) * tokens + t) * topk];
        const bool first = std::find(cu.begin(), cu.end(), t) != cu.end();
        if (same && !first) {
          std::copy(list - topk, list, list);
          continue;
        }
        const int count = std::min(blocks, topk);
        for (int i = 0; i < count;) {
          const int id = i == 0 ? blocks - 1 : static_cast<int>(engine() % blocks);
          if (std::find(list, list + i, id) == list + i) list[i++] = id;
        }
        std::shuffle(list, list + count, engine);
      }
    }
    CUDA_OK(cudaMemcpy(ids, lists.data(), lists.size() * 4, cudaMemcpyHostToDevice));
  }

  void run_attend() { ok(run(attention_plan, attention, stream)); }
  void run_index() { ok(run(index_plan, index, {workspace, 0}, stream)); }
  void run_layer() {
    ok(sm90::decode::run_layer(index_plan, index, attention_plan, attention, {workspace, 0},
                               stream));
  }
  AttendArguments attend_args(bool choose) const {
    AttendArguments a{};
    ok(attend_arguments(attention_plan.problem, attention, &a));
    if (choose) {
      a.scores = workspace;
      a.columns = score_columns(max_kv);
      a.local_blocks = index_plan.problem.local_blocks;
    }
    return a;
  }
  static cudaStream_t stream;
};
cudaStream_t Batched::stream = nullptr;

// ---- naive
// -----------------------------------------------------------------------------------------

struct NaiveArguments {
  const bf16 *q, *k, *v, *q_idx, *k_idx;
  const int32_t *ids, *cu, *kv, *table;
  int sequences, tokens, heads, group, topk, columns;
};

__device__ int naive_visible(const NaiveArguments& a, int t, int* b) {
  for (*b = 0; *b < a.sequences; ++*b) {
    if (t >= a.cu[*b] && t < a.cu[*b + 1])
      return max(0, a.kv[*b] - (a.cu[*b + 1] - a.cu[*b]) + t - a.cu[*b] + 1);
  }
  return 0;
}

/// A CTA of 128 threads per (token, query head); thread = key, then column.
__global__ void naive_attend(NaiveArguments a, float* o, float* lse) {
  const int t = blockIdx.x, h = blockIdx.y, r = h / a.group;
  __shared__ float p[kMaxList * kBlock];
  int b;
  const int visible = naive_visible(a, t, &b);
  const int32_t* ids = a.ids + (int64_t{r} * a.tokens + t) * a.topk;
  int n = 0;
  while (visible > 0 && n < a.topk && ids[n] >= 0) ++n;
  float max = -INFINITY, sum = 0, out = 0;
  for (int i = 0; i < n; ++i) {
    const int key = ids[i] * kBlock + threadIdx.x;
    float s = -INFINITY;
    if (key < visible) {
      s = 0;
      const bf16* k =
          a.k +
          ((int64_t{a.table[b * a.columns + ids[i]]} * a.heads + r) * kBlock + threadIdx.x) * kDim;
      for (int d = 0; d < kDim; ++d)
        s += __bfloat162float(a.q[(int64_t{t} * a.heads * a.group + h) * kDim + d]) *
             __bfloat162float(k[d]);
      s /= sqrtf(kDim);
    }
    p[i * kBlock + threadIdx.x] = s;
  }
  __syncthreads();
  for (int i = 0; i < n * kBlock; ++i) max = fmaxf(max, p[i]);
  for (int i = 0; i < n * kBlock; ++i) {
    const int key = ids[i / kBlock] * kBlock + i % kBlock;
    if (key >= visible) continue;
    const float w = expf(p[i] - max);
    sum += w;
    out += w * __bfloat162float(
                   a.v[((int64_t{a.table[b * a.columns + ids[i / kBlock]]} * a.heads + r) * kBlock +
                        i % kBlock) *
                           kDim +
                       threadIdx.x]);
  }
  const int64_t row = int64_t{t} * a.heads * a.group + h;
  o[row * kDim + threadIdx.x] = sum > 0 ? out / sum : 0;
  if (threadIdx.x == 0) lse[row] = sum > 0 ? max + logf(sum) : -INFINITY;
}

/// A warp per (block, token, head).
__global__ void naive_scores(NaiveArguments a, float* scores) {
  const int j = blockIdx.x, t = blockIdx.y, r = threadIdx.x / 32, lane = threadIdx.x % 32;
  int b;
  const int visible = naive_visible(a, t, &b);
  if (j * kBlock >= visible) return;
  float best = -INFINITY;
  for (int i = lane; i < kBlock && j * kBlock + i < visible; i += 32) {
    float s = 0;
    for (int d = 0; d < kDim; ++d)
      s += __bfloat162float(a.q_idx[(int64_t{t} * a.heads + r) * kDim + d]) *
           __bfloat162float(a.k_idx[(int64_t{a.table[b * a.columns + j]} * kBlock + i) * kDim + d]);
    best = fmaxf(best, s);
  }
  for (int i = 16; i > 0; i /= 2) best = fmaxf(best, __shfl_xor_sync(0xffffffff, best, i));
  if (lane == 0) scores[(int64_t{t} * a.heads + r) * a.columns + j] = best;
}

NaiveArguments naive_args(const Pool& pool, const Batched& x) {
  return {.q = x.q,
          .k = pool.k,
          .v = pool.v,
          .q_idx = x.q_idx,
          .k_idx = pool.k_idx,
          .ids = x.ids,
          .cu = x.batch.cu_seqlens_q.at<int32_t>(),
          .kv = x.batch.seq_lens.at<int32_t>(),
          .table = x.batch.page_table.at<int32_t>(),
          .sequences = x.sequences,
          .tokens = x.tokens,
          .heads = x.heads,
          .group = x.group,
          .topk = x.topk,
          .columns = static_cast<int>(x.columns)};
}

// ---- checks
// ----------------------------------------------------------------------------------------

std::vector<float> outputs_of(const Batched& x) {
  const size_t count = size_t(x.tokens) * x.heads * x.group * kDim;
  std::vector<float> out;
  if (x.attention.o.dtype == DType::kF32) return to_host(static_cast<float*>(x.o), count);
  for (bf16 value : to_host(static_cast<bf16*>(x.o), count)) out.push_back(__bfloat162float(value));
  return out;
}

/// Against the naive kernel over the same ids. Prints the first bad element.
bool expect_attention(const char* what, const Pool& pool, const Batched& x) {
  const size_t rows = size_t(x.tokens) * x.heads * x.group;
  float* o = device_array<float>(rows * kDim);
  float* lse = device_array<float>(rows);
  naive_attend<<<dim3(x.tokens, x.heads * x.group), kDim>>>(naive_args(pool, x), o, lse);
  CUDA_OK(cudaDeviceSynchronize());
  const auto want = to_host(o, rows * kDim), want_lse = to_host(lse, rows);
  const auto got = outputs_of(x), got_lse = to_host(x.lse, rows);
  cudaFree(o), cudaFree(lse);
  double error = 0, norm = 0, lse_error = 0;
  size_t bad = 0, first = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    error += std::pow(double{got[i]} - want[i], 2), norm += std::pow(double{want[i]}, 2);
    if (!(std::fabs(got[i] - want[i]) <= 0.02F + 0.02F * std::fabs(want[i])) && bad++ == 0)
      first = i;
  }
  size_t bad_lse = 0;
  for (size_t i = 0; i < rows; ++i) {
    if (got_lse[i] == want_lse[i]) continue;
    const double difference = std::fabs(double{got_lse[i]} - want_lse[i]);
    if (!(difference < 2e-3)) {
      if (bad_lse++ == 0) printf("  lse row %zu: got %g, want %g\n", i, got_lse[i], want_lse[i]);
    }
    lse_error = std::max(lse_error, difference);
  }
  if (bad > 0)
    printf("  o: %zu bad, first token %zu head %zu column %zu: got %g, want %g\n", bad,
           first / kDim / (x.heads * x.group), first / kDim % (x.heads * x.group), first % kDim,
           got[first], want[first]);
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const bool good = bad == 0 && bad_lse == 0 && relative < 6e-3;
  printf("%-44s %s  |o - o'| / |o'| %.1e  lse %.1e\n", what, good ? "ok  " : "FAIL", relative,
         lse_error);
  return good;
}

bool expect_same(const char* what, const Batched& x, const std::function<void()>& run) {
  const size_t bytes = size_t(x.tokens) * x.heads * x.group * kDim * 4;
  const auto snapshot = [&] { return to_host(static_cast<uint8_t*>(x.o), bytes); };
  const auto before = snapshot();
  for (int i = 0; i < 3; ++i) {
    run();
    CUDA_OK(cudaDeviceSynchronize());
    if (snapshot() != before) {
      printf("%-44s FAIL  repeat %d differs\n", what, i);
      return false;
    }
  }
  return true;
}

/// Scores against the naive ones, ids against a sort of the scores at hand, values against ids.
bool expect_layer(const char* what, const Pool& pool, Batched& x) {
  CUDA_OK(cudaMemset(x.ids, 0x77, size_t(x.heads) * x.tokens * x.topk * 4));
  x.run_layer();
  CUDA_OK(cudaDeviceSynchronize());
  const size_t rows = size_t(x.tokens) * x.heads;
  const int64_t columns = score_columns(x.max_kv);
  float* naive = device_array<float>(rows * x.columns);
  naive_scores<<<dim3(x.columns, x.tokens), 32 * x.heads>>>(naive_args(pool, x), naive);
  CUDA_OK(cudaDeviceSynchronize());
  const auto want = to_host(naive, rows * x.columns), got = to_host(x.workspace, rows * columns);
  cudaFree(naive);
  const auto ids = to_host(x.ids, rows * x.topk);
  size_t bad_scores = 0, bad_ids = 0;
  for (int t = 0; t < x.tokens; ++t) {
    for (int r = 0; r < x.heads; ++r) {
      const int blocks = x.blocks_seen(t);
      const size_t row = (size_t(t) * x.heads + r) * columns;
      const float* wanted = &want[(size_t(t) * x.heads + r) * x.columns];
      for (int j = 0; j < blocks && blocks > 0; ++j) {
        if (!(std::fabs(got[row + j] - wanted[j]) < 1e-3) && bad_scores++ == 0)
          printf("  score token %d head %d block %d: got %g, want %g\n", t, r, j, got[row + j],
                 wanted[j]);
      }
      std::vector<int32_t> best(blocks);
      std::iota(best.begin(), best.end(), 0);
      const auto key = [&](int j) { return j == blocks - 1 ? INFINITY : got[row + j]; };
      std::stable_sort(best.begin(), best.end(), [&](int i, int j) { return key(i) > key(j); });
      best.resize(std::min(blocks, x.topk));
      std::sort(best.begin(), best.end());
      best.resize(x.topk, -1);
      const int32_t* list = &ids[(size_t(r) * x.tokens + t) * x.topk];
      if (!std::equal(best.begin(), best.end(), list) && bad_ids++ == 0) {
        printf("  ids token %d head %d (%d blocks)\n   got ", t, r, blocks);
        for (int i = 0; i < x.topk; ++i) printf(" %d", list[i]);
        printf("\n   want");
        for (int id : best) printf(" %d", id);
        printf("\n");
      }
    }
  }
  if (bad_scores > 0 || bad_ids > 0) {
    printf("%-44s FAIL  %zu scores, %zu lists\n", what, bad_scores, bad_ids);
    return false;
  }
  if (!expect_attention(what, pool, x) || !expect_same(what, x, [&] { x.run_layer(); }))
    return false;

  // The operator of its own: the same ids, and their scores.
  float* scores = device_array<float>(rows * x.topk);
  CUDA_OK(cudaMemset(x.ids, 0x77, rows * x.topk * 4));
  x.index.scores = view_of(scores, DType::kF32, {x.heads, x.tokens, x.topk});
  x.run_index();
  CUDA_OK(cudaDeviceSynchronize());
  const auto ids_scores = to_host(scores, rows * x.topk);
  const bool same = to_host(x.ids, rows * x.topk) == ids;
  x.index.scores = {};
  cudaFree(scores);
  size_t bad = 0;
  for (int t = 0; t < x.tokens; ++t) {
    for (int r = 0; r < x.heads; ++r) {
      for (int i = 0; i < x.topk; ++i) {
        const size_t at = (size_t(r) * x.tokens + t) * x.topk + i;
        const float right = ids[at] < 0 ? -INFINITY
                            : ids[at] == x.blocks_seen(t) - 1
                                ? INFINITY
                                : got[(size_t(t) * x.heads + r) * columns + ids[at]];
        bad += ids_scores[at] != right;
      }
    }
  }
  if (!same || bad > 0)
    printf("%-44s FAIL  index_select: ids %s, %zu scores wrong\n", what, same ? "same" : "differ",
           bad);
  return same && bad == 0;
}

/// NaN behind the last key of every sequence, as a reused page has.
__global__ void poison_tails(bf16* pages, const int32_t* kv, const int32_t* table, int columns,
                             int heads) {
  const int b = blockIdx.x, tail = kv[b] % kBlock;
  if (tail == 0) return;
  bf16* page = pages + int64_t{table[b * columns + kv[b] / kBlock]} * heads * kBlock * kDim;
  for (int h = 0; h < heads; ++h) {
    for (int i = tail * kDim + threadIdx.x; i < kBlock * kDim; i += blockDim.x)
      page[h * kBlock * kDim + i] = __float2bfloat16(NAN);
  }
}

bool checks() {
  struct Case {
    const char* name;
    Lengths lengths;
    int heads, group, topk;
    DType o_type;
  };
  const auto uniform = [](int batch, int q, int kv) {
    return Lengths{std::vector<int32_t>(batch, q), std::vector<int32_t>(batch, kv), 0};
  };
  const std::vector<Case> cases = {
      {"1 x 4096, 64/4", uniform(1, 1, 4096), 4, 16, 16, DType::kBF16},
      {"1 x 4096, 64/4, f32", uniform(1, 1, 4096), 4, 16, 16, DType::kF32},
      {"1 x 5, 64/4", uniform(1, 1, 5), 4, 16, 16, DType::kBF16},
      {"1 x 2049, 64/4", uniform(1, 1, 2049), 4, 16, 16, DType::kBF16},
      {"1 x 131072, 64/4", uniform(1, 1, 131072), 4, 16, 16, DType::kBF16},
      {"1 x 131000, 16/1", uniform(1, 1, 131000), 1, 16, 16, DType::kBF16},
      {"3 x 30000, 8/1", uniform(3, 1, 30000), 1, 8, 16, DType::kBF16},
      {"8 x 8200, 64/4", uniform(8, 1, 8200), 4, 16, 16, DType::kBF16},
      {"8 x 4 tokens, 64/4", uniform(8, 4, 20001), 4, 16, 16, DType::kBF16},
      {"2 x 16 tokens, 64/4", uniform(2, 16, 40002), 4, 16, 16, DType::kBF16},
      {"33 x 3000, 64/4", uniform(33, 1, 3000), 4, 16, 16, DType::kBF16},
      {"90 x 1000, 64/4", uniform(90, 1, 1000), 4, 16, 16, DType::kF32},
      {"ragged, padded, empty; 64/4",
       {{1, 3, 0, 2, 5, 1, 1}, {129, 5000, 77, 2, 12345, 0, 128}, 3},
       4,
       16,
       16,
       DType::kBF16},
      {"ragged; 16/4, K 7", {{2, 1, 4}, {9000, 300, 127}, 1}, 4, 4, 7, DType::kBF16},
      {"ragged; 6/3, K 1", {{2, 1, 7}, {9000, 300, 127}, 1}, 3, 2, 1, DType::kBF16},
      {"ragged; 16/16, K 5", {{2, 1, 7}, {9000, 300, 127}, 1}, 16, 1, 5, DType::kBF16},
      {"1 x 1048576, 64/4", uniform(1, 1, 1 << 20), 4, 16, 16, DType::kBF16},
      {"16 x 70000, 64/4", uniform(16, 2, 70000), 4, 16, 16, DType::kBF16},
  };
  bool good = true;
  for (const Case& c : cases) {
    int64_t pages = 3;
    for (int n : c.lengths.kv) pages += (n + kBlock - 1) / kBlock;
    const Pool pool(pages, c.heads);
    std::vector<int32_t> order(pages);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937 engine(5);
    std::shuffle(order.begin(), order.end(), engine);
    Batched x(pool, 0, order, c.lengths, c.group, c.topk, c.o_type, 11);
    const int32_t *kv = x.batch.seq_lens.at<int32_t>(), *table = x.batch.page_table.at<int32_t>();
    const int columns = static_cast<int>(x.columns);
    poison_tails<<<x.sequences, 256>>>(pool.k, kv, table, columns, c.heads);
    poison_tails<<<x.sequences, 256>>>(pool.v, kv, table, columns, c.heads);
    poison_tails<<<x.sequences, 256>>>(pool.k_idx, kv, table, columns, 1);
    CUDA_OK(cudaDeviceSynchronize());
    x.random_lists(3);
    const auto attend_it = [&] {
      x.run_attend();
      CUDA_OK(cudaDeviceSynchronize());
    };
    attend_it();
    good &= expect_attention((std::string(c.name) + ": attend").c_str(), pool, x);
    good &= expect_same(c.name, x, attend_it);
    good &= expect_layer((std::string(c.name) + ": layer").c_str(), pool, x);
  }
  printf("%s\n\n", good ? "all checks passed" : "CHECKS FAILED");
  return good;
}

// ---- times
// -----------------------------------------------------------------------------------------

struct Time {
  double median, low, high;  // us
};

/// Median over replays of a graph of `calls`, per call.
Time time_graph(const std::vector<std::function<void()>>& calls, int rounds = 1) {
  cudaStream_t stream = Batched::stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < rounds; ++i)
    for (const auto& call : calls) call();
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<double> times;
  for (int i = 0; i < 25; ++i) {
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(replay, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 5) times.push_back(1e3 * ms / (rounds * calls.size()));
  }
  cudaGraphExecDestroy(replay), cudaGraphDestroy(graph);
  cudaEventDestroy(begin), cudaEventDestroy(end);
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[1], times[times.size() - 2]};
}

__global__ void empty_kernel() {
  ptx::wait_for_previous_grid();
  ptx::allow_next_grid();
}

void time_empty() {
  struct Shape {
    const char* name;
    bool overlap;
    uint32_t cluster;
  };
  for (const Shape& s :
       {Shape{"plain edge", false, 1}, Shape{"overlap", true, 1},
        Shape{"overlap, cluster 4", true, 4}, Shape{"overlap, cluster 16", true, 16},
        Shape{"plain, cluster 16", false, 16}}) {
    const Time t = time_graph(
        {[&] {
          ok(launch("empty", empty_kernel, {.grid = 132, .block = kThreads, .shared_bytes = 100000},
                    Batched::stream));
          ok(launch("empty", empty_kernel,
                    {.grid = 64,
                     .block = kThreads,
                     .shared_bytes = 100000,
                     .overlap = s.overlap,
                     .cluster = s.cluster},
                    Batched::stream));
        }},
        20);
    printf("empty pair, second by %-22s %6.2f us\n", s.name, t.median);
  }
  const Time t = time_graph(
      {[&] { ok(launch("empty", empty_kernel, {.grid = 132, .block = 256}, Batched::stream)); }},
      40);
  printf("empty kernel after a plain edge            %6.2f us\n\n", t.median);
}

constexpr double kReadBandwidth = 4.54e6;  // bytes per us

void times() {
  const int heads = 4, group = 16, topk = 16;
  const Pool pool(64 * 1024, heads);
  struct Row {
    int batch, tokens, context;
    double mark, goal;
    bool same = false;  // lists of a sequence's tokens
  };
  const std::vector<Row> rows = {{1, 1, 1 << 15, 11, 9},      {1, 1, 1 << 17, 17, 14},
                                 {1, 1, 1 << 19, 40, 36},     {1, 1, 1 << 20, 71, 66},
                                 {8, 1, 1 << 17, 78, 73},     {32, 1, 1 << 15, 101, 96},
                                 {32, 1, 1 << 17, 288, 276},  {4, 1, 1 << 20, 258, 250},
                                 {8, 4, 1 << 17, 0, 0, true}, {8, 4, 1 << 17, 0, 0, false}};
  printf("%-18s %7s %7s %7s | %7s %7s %7s %7s | %s\n", "batch x context", "bound", "mark", "goal",
         "layer", "low", "high", "of bnd",
         "score  index  choose+attend  no overlap | attend alone by cluster size 1 2 4 8 16");
  for (const Row& row : rows) {
    const int64_t blocks = int64_t{row.batch} * row.context / kBlock;
    const double index_bytes = 256.0 * row.batch * row.context;
    const double kv_bytes =
        4.0 * topk * 2 * kBlock * kDim * 2 * row.batch * (row.same ? 1 : row.tokens);
    const int sets = static_cast<int>(std::clamp<double>(150e6 / (index_bytes + kv_bytes), 2, 16));
    std::vector<int32_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    std::vector<std::unique_ptr<Batched>> caches;  // the layers of a model
    for (int i = 0; i < sets; ++i) {
      caches.push_back(std::make_unique<Batched>(
          pool, i * blocks, order,
          Lengths{std::vector<int32_t>(row.batch, row.tokens),
                  std::vector<int32_t>(row.batch, row.context), 0},
          group, topk, DType::kBF16, 100 + 2 * i, i > 0 ? caches[0].get() : nullptr));
      Batched& x = *caches.back();
      if (row.same) {  // one index query for all tokens of a sequence: one list
        const int64_t size = int64_t{heads} * kDim;
        for (int t = 0; t < x.tokens; ++t)
          CUDA_OK(cudaMemcpy(x.q_idx + t * size, x.q_idx + t / row.tokens * row.tokens * size,
                             size * 2, cudaMemcpyDeviceToDevice));
      }
    }
    const auto each = [&](const std::function<void(Batched&)>& call) {
      std::vector<std::function<void()>> calls;
      for (auto& x : caches) calls.push_back([&call, &x] { call(*x); });
      return time_graph(calls, sets < 8 ? 4 : 1);
    };
    const double bound = (index_bytes + kv_bytes) / kReadBandwidth;
    const Time layer_time = each([](Batched& x) { x.run_layer(); });
    const auto run_score = [](Batched& x) {
      ScoreArguments a{};
      ok(score_arguments(x.index_plan, x.index, {x.workspace, 0}, &a));
      ok(launch_score(x.index_plan, a, Batched::stream));
    };
    const auto launch_alone = [](Batched& x, auto* kernel, bool choose, uint32_t cluster) {
      ok(launch("attend", kernel,
                {.grid = dim3(cluster * x.tokens, x.heads),
                 .block = kThreads,
                 .shared_bytes = sizeof(AttendShared),
                 .cluster = cluster},
                Batched::stream, x.attend_args(choose)));
    };
    const uint32_t cluster = cluster_size(row.batch * row.tokens, heads);
    const auto run_choose = [&](Batched& x) {
      launch_alone(x, sm90::decode::attend<true>, true, cluster);
    };
    const Time index_time = each([](Batched& x) { x.run_index(); });
    const Time score_time = each(run_score);
    const Time choose_time = each(run_choose);
    const Time apart = each([&](Batched& x) { run_score(x), run_choose(x); });
    printf(
        "%2d x %d x %-8d %9.1f %7.0f %7.0f | %7.2f %7.2f %7.2f %6.1f%% | %6.2f %6.2f %6.2f %6.2f |",
        row.batch, row.tokens, row.context, bound, row.mark, row.goal, layer_time.median,
        layer_time.low, layer_time.high, 100 * bound / layer_time.median, score_time.median,
        index_time.median, choose_time.median, apart.median);
    for (uint32_t size = 1; size <= 16; size *= 2) {
      const Time t =
          each([&](Batched& x) { launch_alone(x, sm90::decode::attend<false>, false, size); });
      printf(" %6.2f%s", t.median, size == cluster ? "*" : "");
    }
    printf("\n");
    fflush(stdout);
  }
}

}  // namespace bench

int main(int argc, char** argv) {
  using namespace bench;
  setvbuf(stdout, nullptr, _IOLBF, 0);
  CUDA_OK(cudaStreamCreate(&Batched::stream));
  const std::string mode = argc > 1 ? argv[1] : "all";
  const bool good = mode == "time" || checks();
  if (mode != "check") {
    time_empty();
    times();
  }
  return good ? 0 : 1;
}
