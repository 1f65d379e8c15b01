// Development driver of sm90/dense: `dense_bench check` compares with a naive kernel on random
// ragged batches, `dense_bench time [filter]` measures.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//     dev/dense_bench.cu src/cuda/sm90/dense/launch.cu src/cuda/{tensor_map,device}.cc
//     src/core/names.cc -o dense_bench
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/sm90/dense/launch.h"

using namespace msa;

namespace {

void must(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("FAILED: %s: %s\n", what, cudaGetErrorString(result));
  std::fflush(stdout);
  std::_Exit(1);
}
void must(const Status& status, const char* what) {
  if (status.ok()) return;
  std::printf("FAILED: %s: %s\n", what, status.message().c_str());
  std::fflush(stdout);
  std::_Exit(1);
}

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;
  explicit Buffer(size_t n) : count(n) {
    must(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)), "malloc");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    must(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  ~Buffer() { cudaFree(data); }
  Buffer(const Buffer&) = delete;
  std::vector<T> host() const {
    std::vector<T> out(count);
    must(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return out;
  }
};

__device__ uint32_t mix(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL, x ^= x >> 33;
  return static_cast<uint32_t>(x);
}
/// About normal: four uniforms.
__global__ void fill_random(__nv_bfloat16* out, size_t n, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{256} + threadIdx.x; i < n; i += size_t{gridDim.x} * 256) {
    float sum = 0;
    for (int k = 0; k < 4; ++k)
      sum += mix(i * 4 + k + seed * 0x9e3779b97f4a7c15ULL) * 0x1p-32F - 0.5F;
    out[i] = __float2bfloat16(sum * 1.732F);
  }
}

/// One row to compare: query row t, head h, its keys.
struct Row {
  int t, head, kv_head, visible;
  int k_begin, pages;  // packed: first key row; paged: offset in the table, else -1
};
struct Naive {
  const __nv_bfloat16 *q, *k, *v;
  int64_t q_stride, token, head, page;  // of q: row; of k and v
  int heads_q;
  const int* table;
  int pool;
  float scale;
  int columns;
  float* o;          // [rows,128]
  float* lse;        // [rows]
  float* block_max;  // [rows,columns]
};

__global__ void __launch_bounds__(256) naive(Naive a, const Row* rows) {
  const Row r = rows[blockIdx.x];
  __shared__ float q[128], p[256], part[256];
  const int tid = static_cast<int>(threadIdx.x);
  if (tid < 128) q[tid] = __bfloat162float(a.q[r.t * a.q_stride + r.head * 128 + tid]);
  __syncthreads();
  const auto place = [&](int s) -> int64_t {
    if (r.pages < 0) return int64_t{r.k_begin + s} * a.token + r.kv_head * a.head;
    const int page = a.table[r.pages + s / 128];
    if (page < 0 || page >= a.pool) return -1;
    return page * a.page + r.kv_head * a.head + s % 128 * a.token;
  };
  const auto score = [&](int s) {
    const int64_t at = place(s);
    if (at < 0) return -INFINITY;
    float dot = 0;
    for (int d = 0; d < 128; ++d) dot += q[d] * __bfloat162float(a.k[at + d]);
    return dot;
  };
  float max = -INFINITY;
  for (int j = tid; j < a.columns; j += 256) {
    float m = -INFINITY;
    for (int s = j * 128; s < min(j * 128 + 128, r.visible); ++s) m = fmaxf(m, score(s));
    a.block_max[int64_t{blockIdx.x} * a.columns + j] = m;
    max = fmaxf(max, m);
  }
  part[tid] = max;
  __syncthreads();
  for (int i = 0; i < 256; ++i) max = fmaxf(max, part[i]);
  __syncthreads();
  float sum = 0, o = 0;
  for (int base = 0; base < r.visible; base += 256) {
    const int s = base + tid;
    p[tid] = s < r.visible && max > -INFINITY ? expf((score(s) - max) * a.scale) : 0;
    sum += p[tid];
    __syncthreads();
    for (int i = tid / 128; i < min(256, r.visible - base); i += 2) {
      const int64_t at = place(base + i);
      if (at >= 0) o += p[i] * __bfloat162float(a.v[at + tid % 128]);
    }
    __syncthreads();
  }
  part[tid] = sum, p[tid] = o;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < 256; ++i) sum += part[i];
  if (tid < 128) a.o[int64_t{blockIdx.x} * 128 + tid] = sum > 0 ? (p[tid] + p[tid + 128]) / sum : 0;
  if (tid == 0) a.lse[blockIdx.x] = sum > 0 ? max * a.scale + logf(sum) : -INFINITY;
}

struct Case {
  const char* name;
  int heads_q = 64, heads_kv = 4;
  bool paged = false, causal = true;
  std::vector<int> q_lens, kv_lens;
  bool block_max = false, wide = false, lse = true;
  int padding = 0;    // rows behind the last sequence
  int max_q_len = 0;  // of the plan; 0: the longest
  std::vector<int> q_offset{};
  std::vector<int> block_offset{};
  bool stale = false;    // NaN behind kv_len, one invalid page
  bool shuffled = true;  // pages in random order
};

/// A batch in device memory, ready to run.
struct Instance {
  Case c;
  std::vector<int> cu_q{0}, cu_k{0}, table;
  int max_pages = 1, pool = 1, tokens;
  Problem problem;
  Plan plan;
  DenseAttentionParams params;
  std::vector<Buffer<int>*> ints;
  Buffer<__nv_bfloat16>*q, *k, *v;
  Buffer<float>*o, *lse, *block_max;
  Buffer<char>* workspace;
  int64_t columns = 1;

  TensorView view(const void* data, DType dtype, std::initializer_list<int64_t> shape) {
    TensorView t = TensorView::contiguous(data, dtype, shape);
    t.device.kind = DeviceKind::kCUDA;
    return t;
  }
  TensorView metadata(const std::vector<int>& host) {
    ints.push_back(new Buffer<int>(host));
    return view(ints.back()->data, DType::kI32, {static_cast<int64_t>(host.size())});
  }

  explicit Instance(const Case& c_, uint64_t seed = 1) : c(c_) {
    const int B = static_cast<int>(c.q_lens.size());
    int longest = 0, longest_q = 0;
    for (int b = 0; b < B; ++b) {
      cu_q.push_back(cu_q.back() + c.q_lens[b]);
      cu_k.push_back(cu_k.back() + c.kv_lens[b]);
      longest = std::max(longest, c.kv_lens[b]);
      longest_q = std::max(longest_q, c.q_lens[b]);
    }
    tokens = cu_q.back() + c.padding;
    columns = std::max(1, (longest + 127) / 128);
    max_pages = static_cast<int>(columns);
    problem.op = Op::kDenseAttention;
    problem.dtype = DType::kBF16;
    problem.layout = c.paged ? KvLayout::kPaged : KvLayout::kPacked;
    problem.heads_q = c.heads_q, problem.heads_kv = c.heads_kv;
    problem.device.kind = DeviceKind::kCUDA;
    if (!cuda::sm90::dense::fits(problem)) must(cudaErrorInvalidValue, "fits");
    plan.problem = problem;
    plan.limits = {.max_batch = B,
                   .max_tokens = tokens,
                   .max_q_len = c.max_q_len ? c.max_q_len : longest_q,
                   .max_kv_len = longest};
    plan.workspace_bytes = cuda::sm90::dense::workspace_bytes(problem, plan.limits);
    workspace = new Buffer<char>(plan.workspace_bytes);
    must(cudaMemset(workspace->data, 0xff, workspace->count), "poison");

    if (c.paged) {
      pool = 0;
      for (int b = 0; b < B; ++b) pool += (c.kv_lens[b] + 127) / 128;
      pool = std::max(pool, 1);
      std::vector<int> order(pool);
      for (int i = 0; i < pool; ++i) order[i] = i;
      if (c.shuffled) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
      table.assign(size_t(B) * max_pages, -7);
      int next = 0;
      for (int b = 0; b < B; ++b)
        for (int j = 0; j < (c.kv_lens[b] + 127) / 128; ++j)
          table[b * max_pages + j] = order[next++];
    }
    const size_t rows = c.paged ? size_t(pool) * 128 : cu_k.back() + 1;
    const size_t elements = std::max<size_t>(rows, 1) * c.heads_kv * 128;
    q = new Buffer<__nv_bfloat16>(size_t(tokens) * c.heads_q * 128);
    k = new Buffer<__nv_bfloat16>(elements);
    v = new Buffer<__nv_bfloat16>(elements);
    fill_random<<<1024, 256>>>(q->data, q->count, 3 * seed);
    fill_random<<<1024, 256>>>(k->data, k->count, 3 * seed + 1);
    fill_random<<<1024, 256>>>(v->data, v->count, 3 * seed + 2);
    if (c.stale && c.paged) {
      for (int b = 0; b < B; ++b) {
        const int left = c.kv_lens[b] % 128;
        for (int h = 0; left && h < c.heads_kv; ++h) {
          const size_t page = table[b * max_pages + c.kv_lens[b] / 128];
          const size_t at = ((page * c.heads_kv + h) * 128 + left) * 128;
          must(cudaMemset(k->data + at, 0xff, (128 - left) * 256), "stale");
          must(cudaMemset(v->data + at, 0xff, (128 - left) * 256), "stale");
        }
      }
      if (table.size() > 2) table[1] = pool + 5;
    }
    must(cudaDeviceSynchronize(), "fill");
    o = new Buffer<float>(size_t(tokens) * c.heads_q * 128);
    lse = new Buffer<float>(size_t(tokens) * c.heads_q);
    block_max = new Buffer<float>(c.block_max ? size_t(tokens) * c.heads_q * columns : 1);
    const int64_t T = tokens, Hq = c.heads_q, Hkv = c.heads_kv;
    params.q = view(q->data, DType::kBF16, {T, Hq, 128});
    if (c.paged) {
      params.k = view(k->data, DType::kBF16, {pool, Hkv, 128, 128});
      params.v = view(v->data, DType::kBF16, {pool, Hkv, 128, 128});
      params.batch.seq_lens = metadata(c.kv_lens);
      params.batch.page_table = metadata(table);
      params.batch.page_table.rank = 2;
      params.batch.page_table.shape = {B, max_pages};
      params.batch.page_table.stride = {max_pages, 1};
    } else {
      params.k = view(k->data, DType::kBF16, {int64_t(rows), Hkv, 128});
      params.v = view(v->data, DType::kBF16, {int64_t(rows), Hkv, 128});
      params.batch.cu_seqlens_k = metadata(cu_k);
    }
    params.batch.cu_seqlens_q = metadata(cu_q);
    if (!c.q_offset.empty()) params.batch.q_offset = metadata(c.q_offset);
    if (!c.block_offset.empty()) params.batch.block_offset = metadata(c.block_offset);
    params.batch.causal = c.causal;
    params.o = view(o->data, c.wide ? DType::kF32 : DType::kBF16, {T, Hq, 128});
    if (c.lse) params.lse = view(lse->data, DType::kF32, {T, Hq});
    if (c.block_max) params.block_max = view(block_max->data, DType::kF32, {Hq, T, columns});
  }
  ~Instance() {
    for (auto* b : ints) delete b;
    delete q, delete k, delete v, delete o, delete lse, delete block_max, delete workspace;
  }
  Instance(const Instance&) = delete;

  void run(cudaStream_t stream) {
    must(cuda::sm90::dense::run(plan, params, {workspace->data, workspace->count}, stream), c.name);
  }

  int visible(int b, int i) const {
    if (!c.causal) return c.kv_lens[b];
    const int block0 = c.block_offset.empty() ? 0 : c.block_offset[b];
    const int pos0 = c.q_offset.empty() ? block0 * 128 + c.kv_lens[b] - c.q_lens[b] : c.q_offset[b];
    return std::clamp(pos0 + i + 1 - block0 * 128, 0, c.kv_lens[b]);
  }
};

/// True when right. Compares `limit` rows spread over the batch.
bool check(const Case& c, size_t limit = 6000) {
  Instance x(c);
  std::vector<Row> rows;
  const int B = static_cast<int>(c.q_lens.size());
  const size_t all = size_t(x.cu_q.back()) * c.heads_q, step = all / limit + 1;
  size_t n = 0;
  for (int b = 0; b < B; ++b)
    for (int i = 0; i < c.q_lens[b]; ++i)
      for (int h = 0; h < c.heads_q; ++h, ++n)
        if (n % step == 0 || i + 1 == c.q_lens[b])
          rows.push_back({x.cu_q[b] + i, h, h / (c.heads_q / c.heads_kv), x.visible(b, i),
                          x.cu_k[b], c.paged ? b * x.max_pages : -1});
  Buffer<Row> device_rows(rows);
  Buffer<int> table(x.table);
  Buffer<float> o(rows.size() * 128), lse(rows.size()), maxima(rows.size() * x.columns);
  const int64_t kv = c.paged ? 128 : c.heads_kv * 128;
  Naive a{x.q->data,
          x.k->data,
          x.v->data,
          int64_t{c.heads_q} * 128,
          kv,
          c.paged ? 128 * 128 : 128,
          int64_t{c.heads_kv} * 128 * 128,
          c.heads_q,
          table.data,
          x.pool,
          1 / std::sqrt(128.F),
          static_cast<int>(x.columns),
          o.data,
          lse.data,
          maxima.data};
  if (!rows.empty()) naive<<<static_cast<unsigned>(rows.size()), 256>>>(a, device_rows.data);
  must(cudaDeviceSynchronize(), "naive");

  std::vector<float> first_o, first_lse, first_max;
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    must(cudaMemset(x.o->data, 0xff, x.o->count * 4), "poison");
    must(cudaMemset(x.lse->data, 0xff, x.lse->count * 4), "poison");
    must(cudaMemset(x.block_max->data, 0xff, x.block_max->count * 4), "poison");
    x.run(nullptr);
    must(cudaDeviceSynchronize(), c.name);
    const auto got_o = x.o->host(), got_lse = x.lse->host(), got_max = x.block_max->host();
    if (repeat == 0) first_o = got_o, first_lse = got_lse, first_max = got_max;
    const auto equal = [](const auto& l, const auto& r) {
      return std::memcmp(l.data(), r.data(), l.size() * 4) == 0;
    };
    same = same && equal(first_o, got_o) && equal(first_lse, got_lse) && equal(first_max, got_max);
  }
  const auto want_o = o.host(), want_lse = lse.host(), want_max = maxima.host();
  const auto value = [&](size_t i) {
    if (c.wide) return first_o[i];
    return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(first_o.data())[i]);
  };
  double error = 0, norm = 0, worst_lse = 0, worst_max = 0;
  size_t bad = 0;
  const auto report = [&](const char* what, const Row& r, int64_t j, float want, float got) {
    if (++bad <= 3)
      std::printf("    %s: row %d head %d (visible %d) at %ld: expected %g, got %g\n", what, r.t,
                  r.head, r.visible, j, want, got);
  };
  for (size_t i = 0; i < rows.size(); ++i) {
    const Row& r = rows[i];
    const size_t at = size_t(r.t) * c.heads_q + r.head;
    for (int d = 0; d < 128; ++d) {
      const float want = want_o[i * 128 + d], got = value(at * 128 + d);
      error += (want - got) * double(want - got), norm += double(want) * want;
      if (!(std::abs(want - got) < 2e-2 + 2e-2 * std::abs(want))) report("o", r, d, want, got);
    }
    if (c.lse) {
      const float want = want_lse[i], got = first_lse[at];
      if (want != got) worst_lse = std::max(worst_lse, std::abs(double(want) - got));
      if (want != got && !(std::abs(want - got) < 1e-3)) report("lse", r, 0, want, got);
    }
    for (int64_t j = 0; c.block_max && j < x.columns; ++j) {
      const float want = want_max[i * x.columns + j];
      const float got = first_max[(size_t(r.head) * x.tokens + r.t) * x.columns + j];
      if (want != got) worst_max = std::max(worst_max, std::abs(double(want) - got));
      if (want != got && !(std::abs(want - got) < 1e-3)) report("block_max", r, j, want, got);
    }
  }
  for (int t = x.cu_q.back(); t < x.tokens; ++t) {
    for (int h = 0; h < c.heads_q; ++h) {
      const size_t at = size_t(t) * c.heads_q + h;
      const Row r{t, h, 0, 0, 0, 0};
      for (int d = 0; d < 128; ++d)
        if (value(at * 128 + d) != 0) report("padded o", r, d, 0, value(at * 128 + d));
      if (c.lse && first_lse[at] != -INFINITY) report("padded lse", r, 0, -INFINITY, first_lse[at]);
    }
  }
  const double relative = norm > 0 ? std::sqrt(error / norm) : std::sqrt(error);
  const bool ok = bad == 0 && same && relative < 8e-3;
  std::printf("  %-34s %s  rows %zu, |o| error %.2e, lse %.1e, max %.1e, wrong %zu%s\n", c.name,
              ok ? "ok  " : "FAIL", rows.size(), relative, worst_lse, worst_max, bad,
              same ? "" : ", NOT REPEATABLE");
  std::fflush(stdout);
  return ok;
}

bool check_all() {
  bool ok = true;
  const std::vector<Case> cases = {
      {.name = "one block", .q_lens = {128}, .kv_lens = {128}, .max_q_len = 8192},
      {.name = "prefill 300 packed", .q_lens = {300}, .kv_lens = {300}, .block_max = true},
      {.name = "prefill 1024 packed", .q_lens = {1024}, .kv_lens = {1024}, .block_max = true},
      {.name = "prefill 5000 whole tiles", .q_lens = {5000}, .kv_lens = {5000}},
      {.name = "prefill 5000 paged f32",
       .paged = true,
       .q_lens = {5000},
       .kv_lens = {5003},
       .block_max = true,
       .wide = true},
      {.name = "extend 777 over 9000", .paged = true, .q_lens = {777}, .kv_lens = {9777}},
      {.name = "extend 5 over 9000",
       .paged = true,
       .q_lens = {5},
       .kv_lens = {9005},
       .block_max = true},
      {.name = "extend 3000, full",
       .paged = true,
       .causal = false,
       .q_lens = {3000},
       .kv_lens = {9005}},
      {.name = "ragged paged stale padded",
       .paged = true,
       .q_lens = {1, 0, 300, 500, 3, 130},
       .kv_lens = {400, 500, 333, 500, 0, 4000},
       .block_max = true,
       .padding = 5,
       .stale = true},
      {.name = "ragged paged, whole tiles",
       .paged = true,
       .q_lens = {1, 0, 1700, 3100, 3, 130},
       .kv_lens = {400, 500, 1733, 3100, 0, 4000},
       .block_max = true,
       .padding = 5,
       .stale = true},
      {.name = "ragged packed G 8",
       .heads_q = 16,
       .heads_kv = 2,
       .q_lens = {64, 300, 1, 1000},
       .kv_lens = {64, 299, 77, 1500},
       .padding = 3},
      {.name = "G 1", .heads_q = 2, .heads_kv = 2, .q_lens = {64, 300}, .kv_lens = {64, 999}},
      {.name = "G 7", .heads_q = 14, .heads_kv = 2, .q_lens = {64, 300}, .kv_lens = {64, 999}},
      {.name = "G 16 one KV head",
       .heads_q = 16,
       .heads_kv = 1,
       .q_lens = {3000},
       .kv_lens = {3000}},
      {.name = "decode 1 x 20000",
       .paged = true,
       .q_lens = {1},
       .kv_lens = {20000},
       .block_max = true},
      {.name = "decode 1 x 300", .paged = true, .q_lens = {1}, .kv_lens = {300}},
      {.name = "decode 7 ragged stale",
       .paged = true,
       .q_lens = {1, 1, 1, 1, 1, 1, 1},
       .kv_lens = {300, 128, 0, 9999, 129, 3000, 1},
       .padding = 1,
       .stale = true},
      {.name = "decode 40 x ~2000",
       .paged = true,
       .q_lens = std::vector<int>(40, 1),
       .kv_lens = std::vector<int>(40, 2003),
       .wide = true},
      {.name = "decode 4 tokens",
       .paged = true,
       .q_lens = {4, 4, 3},
       .kv_lens = {4444, 130, 129},
       .block_max = true},
      {.name = "decode 16 tokens",
       .paged = true,
       .q_lens = {16, 16, 9},
       .kv_lens = {4444, 130, 129}},
      {.name = "decode G 8",
       .heads_q = 8,
       .heads_kv = 1,
       .paged = true,
       .q_lens = {1, 4},
       .kv_lens = {4444, 10300}},
      {.name = "q_offset, shard",
       .q_lens = {200, 1200},
       .kv_lens = {1000, 2000},
       .block_max = true,
       .q_offset = {3000, 500},
       .block_offset = {16, 4}},
  };
  for (const Case& c : cases) ok = check(c) && ok;
  std::printf("check: %s\n", ok ? "all right" : "WRONG");
  return ok;
}

/// Median, fastest and slowest milliseconds of a graph of one call, instances taking turns.
void measure(const Case& c, int buffers, int repeats, double flops, double bytes) {
  std::vector<Instance*> instances;
  for (int i = 0; i < buffers; ++i) instances.push_back(new Instance(c, i + 1));
  cudaStream_t stream;
  must(cudaStreamCreate(&stream), "stream");
  std::vector<cudaGraphExec_t> graphs;
  for (Instance* x : instances) {
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    must(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
    x->run(stream);
    must(cudaStreamEndCapture(stream, &graph), "capture");
    must(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
    graphs.push_back(exec);
  }
  std::vector<cudaEvent_t> events(2 * repeats);
  for (auto& e : events) must(cudaEventCreate(&e), "event");
  const int warmups = repeats > 5 ? 5 : 2;
  for (int i = 0; i < warmups; ++i) must(cudaGraphLaunch(graphs[i % buffers], stream), "launch");
  must(cudaStreamSynchronize(stream), c.name);
  for (int i = 0; i < repeats; ++i) {
    must(cudaEventRecord(events[2 * i], stream), "event");
    must(cudaGraphLaunch(graphs[i % buffers], stream), "launch");
    must(cudaEventRecord(events[2 * i + 1], stream), "event");
  }
  must(cudaStreamSynchronize(stream), c.name);
  std::vector<float> times;
  for (int i = 0; i < repeats; ++i) {
    float ms;
    must(cudaEventElapsedTime(&ms, events[2 * i], events[2 * i + 1]), "elapsed");
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  const double ms = times[times.size() / 2];
  std::printf("  %-26s %10.4f ms (%.4f .. %.4f)", c.name, ms, times.front(), times.back());
  if (flops > 0) std::printf("  %6.1f TFLOP/s", flops / ms * 1e-9);
  if (bytes > 0) std::printf("  %6.2f TB/s", bytes / ms * 1e-9);
  std::printf("\n");
  std::fflush(stdout);
  for (auto g : graphs) cudaGraphExecDestroy(g);
  for (auto e : events) cudaEventDestroy(e);
  for (Instance* x : instances) delete x;
  cudaStreamDestroy(stream);
}

void time_all(const std::string& filter) {
  const auto wanted = [&](const std::string& name) { return name.find(filter) != name.npos; };
  const auto prefill = [&](const char* name, int n, int repeats, bool maxima = false,
                           bool paged = true) {
    if (!wanted(name)) return;
    const double pairs = double(n) * (n + 1) / 2;
    measure({.name = name, .paged = paged, .q_lens = {n}, .kv_lens = {n}, .block_max = maxima}, 1,
            repeats, pairs * 4 * 128 * 64, 0);
  };
  enum Layout { kShuffled, kInOrder, kPacked };
  const auto decode = [&](const char* name, int batch, int n, int buffers, int tokens = 1,
                          Layout layout = kShuffled) {
    if (!wanted(name)) return;
    measure({.name = name,
             .paged = layout != kPacked,
             .q_lens = std::vector<int>(batch, tokens),
             .kv_lens = std::vector<int>(batch, n),
             .shuffled = layout == kShuffled},
            buffers, 20, 0, double(batch) * n * 4 * 128 * 2 * 2);
  };
  prefill("prefill 8K", 8192, 20);
  prefill("prefill 32K", 32768, 8);
  prefill("prefill 32K packed", 32768, 5, false, false);
  prefill("prefill 32K block_max", 32768, 3, true);
  prefill("prefill 128K", 131072, 3);
  if (!filter.empty()) prefill("prefill long run of 32K", 32768, 50);
  decode("decode 1 x 32K", 1, 32768, 8);
  decode("decode 1 x 128K", 1, 131072, 3);
  decode("decode 1 x 1M", 1, 1 << 20, 1);
  decode("decode 1 x 1M in order", 1, 1 << 20, 1, 1, kInOrder);
  decode("decode 1 x 1M packed", 1, 1 << 20, 1, 1, kPacked);
  decode("decode 8 x 128K", 8, 131072, 1);
  decode("decode 32 x 32K", 32, 32768, 1);
  decode("decode 32 x 32K in order", 32, 32768, 1, 1, kInOrder);
  decode("decode 32 x 32K packed", 32, 32768, 1, 1, kPacked);
  decode("decode 32 x 32K, 4 tokens", 32, 32768, 1, 4);
  decode("decode 32 x 32K, 8 tokens", 32, 32768, 1, 8);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check") return check_all() ? 0 : 1;
  time_all(argc > 2 ? argv[2] : "");
  return 0;
}
