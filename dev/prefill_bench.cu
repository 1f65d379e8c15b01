// Prefill kernels on a bare Hopper machine: correctness of both orders on small ragged batches
// against a naive kernel, then timing with random selections and with a trace of real ones: the
// orders by turns, and the steps of KV-outer one by one.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//     -o prefill_bench dev/prefill_bench.cu src/cuda/device.cc src/cuda/tensor_map.cc libmsa.a
//   prefill_bench check | time [lists.u8 HEADS TOKENS]
//
// lists.u8: block ids u8 [HEADS,TOKENS,16] of one whole prefill of at most 32K tokens, ascending;
// 255 is -1 where a token cannot see block 255.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/sm90/prefill/launch.cu"  // the steps of KV-outer are nobody else's business
#include "msa/ops.h"

namespace {

using namespace msa;
namespace prefill = msa::cuda::sm90::prefill;

using prefill::Order;
constexpr int kDim = 128, kBlock = 128;
constexpr std::array kOrders{Order::kUnion, Order::kKvOuter};
const char* name_of(Order order) { return order == Order::kUnion ? "union" : "kv-outer"; }

void must(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}
void must(const Status& status, const char* what) {
  if (status.ok()) return;
  std::printf("FAILED %s: %s\n", what, status.message().c_str());
  std::exit(1);
}

/// Device memory that is never given back.
template <class T>
T* device_array(size_t count) {
  void* p = nullptr;
  must(cudaMalloc(&p, std::max<size_t>(count * sizeof(T), 256)), "cudaMalloc");
  return static_cast<T*>(p);
}
template <class T>
T* to_device(const std::vector<T>& v) {
  T* p = device_array<T>(v.size());
  must(cudaMemcpy(p, v.data(), v.size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
  return p;
}
template <class T>
std::vector<T> to_host(const T* p, size_t count) {
  std::vector<T> v(count);
  must(cudaMemcpy(v.data(), p, count * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
  return v;
}

__device__ uint32_t mix(uint64_t x) {
  x = (x ^ x >> 31) * 0x9E3779B97F4A7C15ull;
  x = (x ^ x >> 29) * 0xBF58476D1CE4E5B9ull;
  return static_cast<uint32_t>(x >> 32);
}
/// About normal, standard deviation 1.
__global__ void fill_random(__nv_bfloat16* p, size_t count, uint64_t seed) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    float sum = -2;
    for (int k = 0; k < 4; ++k) sum += mix(seed * 1000003 + 4 * i + k) * 0x1p-32f;
    p[i] = __float2bfloat16(sum * 1.732f);
  }
}
/// K distinct visible blocks, the local one among them, ascending; a whole prefill of one sequence.
__global__ void random_ids(int32_t* ids, int heads, int tokens, int prefix, int topk,
                           uint64_t seed) {
  const int64_t row = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (row >= int64_t{heads} * tokens) return;
  const int t = prefix + static_cast<int>(row % tokens), visible = t / kBlock + 1;
  int32_t* list = ids + row * topk;
  int n = 0;
  uint64_t draw = seed + row * 4096;
  while (n < min(topk, visible)) {
    const int id = n == 0 ? visible - 1 : static_cast<int>(mix(draw++) % visible);
    int at = 0;
    while (at < n && list[at] < id) ++at;
    if (at < n && list[at] == id) continue;
    for (int i = n; i > at; --i) list[i] = list[i - 1];
    list[at] = id;
    ++n;
  }
  for (; n < topk; ++n) list[n] = -1;
}
template <class T>
__global__ void count_different(const T* a, const T* b, size_t count, unsigned long long* out) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x)
    if (a[i] != b[i]) atomicAdd(out, 1ull);
}

/// One CTA of 128 threads per (sampled token, query head).
struct Naive {
  const __nv_bfloat16 *q, *k, *v;
  const int32_t *ids, *pages;
  int64_t q_token, q_head, k_token, k_head, k_page;  // strides
  int64_t ids_head, ids_token;
  int topk, group;
  float scale;
  const int32_t* rows;  // per sample: row, k_begin, visible, block0, page table row or -1
  int max_pages;
  float *o, *lse;  // [samples,Hq,D], [samples,Hq]
};
__global__ void naive(Naive a) {
  __shared__ float logit[16 * kBlock], reduce[128];
  const int sample = blockIdx.x, h = blockIdx.y, head = h / a.group, thread = threadIdx.x;
  const int row = a.rows[5 * sample], k_begin = a.rows[5 * sample + 1],
            visible = a.rows[5 * sample + 2], block0 = a.rows[5 * sample + 3],
            table = a.rows[5 * sample + 4];
  const __nv_bfloat16* q = a.q + row * a.q_token + h * a.q_head;
  const int32_t* ids = a.ids + head * a.ids_head + row * a.ids_token;
  const auto key = [&](const __nv_bfloat16* pool, int token) {
    return table < 0 ? pool + (k_begin + token) * a.k_token + head * a.k_head
                     : pool + a.pages[table * a.max_pages + token / kBlock] * a.k_page +
                           head * a.k_head + token % kBlock * a.k_token;
  };
  const int end = visible == 0 ? 0 : a.topk;
  float max = -INFINITY;
  int slots = 0;
  for (; slots < end && ids[slots] >= 0; ++slots) {
    const int token = (ids[slots] - block0) * kBlock + thread;
    float x = -INFINITY;
    if (ids[slots] >= block0 && token < visible) {
      const __nv_bfloat16* k = key(a.k, token);
      x = 0;
      for (int d = 0; d < kDim; ++d) x += __bfloat162float(q[d]) * __bfloat162float(k[d]);
      x *= a.scale;
    }
    logit[slots * kBlock + thread] = x;
    max = fmaxf(max, x);
  }
  reduce[thread] = max;
  __syncthreads();
  for (int i = 0; i < 128; ++i) max = fmaxf(max, reduce[i]);
  float sum = 0, o = 0;
  for (int i = 0; i < slots * kBlock; ++i) {
    if (logit[i] == -INFINITY) continue;
    const float p = expf(logit[i] - max);
    sum += p;
    o += p * __bfloat162float(key(a.v, (ids[i / kBlock] - block0) * kBlock + i % kBlock)[thread]);
  }
  const int64_t out = int64_t{sample} * gridDim.y + h;
  a.o[out * kDim + thread] = sum > 0 ? o / sum : 0;
  if (thread == 0) a.lse[out] = sum > 0 ? max + logf(sum) : -INFINITY;
}

struct Case {
  const char* name;
  int heads_kv = 2, group = 16, topk = 16;
  std::vector<int> q_lens, kv_lens;
  bool paged = false, causal = true, f32_out = false, any_order = false, padded = false;
  bool shared_list = false;
  int block0 = 0, q_offset = -1;
  float scale = 0;
  float overlap = 0.8f;  ///< probability to keep the neighbour's block
};

std::mt19937 rng(1234);

/// Runs one small batch in one order; prints one line. Poisoned outputs, NaN behind each sequence's
/// keys.
bool check_case(const Case& c, Order order) {
  const int sequences = static_cast<int>(c.q_lens.size());
  const int heads_q = c.heads_kv * c.group;
  std::vector<int32_t> cu_q{0}, cu_k{0};
  for (int n : c.q_lens) cu_q.push_back(cu_q.back() + n);
  for (int n : c.kv_lens) cu_k.push_back(cu_k.back() + n);
  const int tokens = cu_q.back() + (c.padded ? 21 : 0);
  const int max_pages = (*std::max_element(c.kv_lens.begin(), c.kv_lens.end()) + 127) / 128 + 1;
  int pages = 3;
  for (int n : c.kv_lens) pages += (n + 127) / 128;
  const int64_t keys = c.paged ? int64_t{pages} * kBlock : cu_k.back() + 40;

  // Random values everywhere; NaN where no sequence has keys.
  const auto random_bf16 = [&](size_t count, uint64_t seed) {
    auto* p = device_array<__nv_bfloat16>(count);
    fill_random<<<256, 256>>>(p, count, seed);
    return p;
  };
  __nv_bfloat16* q = random_bf16(size_t(tokens) * (heads_q + 1) * kDim, rng());
  const size_t pool = size_t(keys) * c.heads_kv * kDim;
  auto k_host = to_host(random_bf16(pool, rng()), pool);
  auto v_host = to_host(random_bf16(pool, rng()), pool);
  std::vector<int32_t> table(size_t(sequences) * max_pages, -7), free_pages(pages);
  std::iota(free_pages.begin(), free_pages.end(), 0);
  std::shuffle(free_pages.begin(), free_pages.end(), rng);
  const auto poison = [&](int64_t row) {  // row: token (packed) or page * Bk + token
    for (int h = 0; h < c.heads_kv; ++h)
      for (int d = 0; d < kDim; ++d) {
        const int64_t at = c.paged
                               ? ((row / kBlock * c.heads_kv + h) * kBlock + row % kBlock) * kDim
                               : (row * c.heads_kv + h) * kDim;
        k_host[at + d] = v_host[at + d] = __float2bfloat16(NAN);
      }
  };
  if (c.paged) {
    for (int b = 0, next = 0; b < sequences; ++b)
      for (int j = 0; j * kBlock < c.kv_lens[b]; ++j) {
        table[size_t(b) * max_pages + j] = free_pages[next++];
        for (int s = c.kv_lens[b]; s < (j + 1) * kBlock; ++s)
          poison(int64_t{table[size_t(b) * max_pages + j]} * kBlock + s % kBlock);
      }
  } else {
    for (int64_t s = cu_k.back(); s < keys; ++s) poison(s);
  }
  auto* k = to_device(k_host);
  auto* v = to_device(v_host);

  // Lists: each token keeps most of its neighbour's blocks.
  const int lists = c.shared_list ? 1 : c.heads_kv;
  std::vector<int32_t> ids(size_t(lists) * tokens * c.topk, 99999);
  std::vector<int32_t> rows;
  for (int h = 0; h < lists; ++h) {
    for (int b = 0; b < sequences; ++b) {
      std::vector<int> last;
      const int blocks = (c.kv_lens[b] + 127) / 128;
      for (int i = 0; i < c.q_lens[b]; ++i) {
        const int pos0 =
            c.q_offset >= 0 ? c.q_offset : c.block0 * kBlock + c.kv_lens[b] - c.q_lens[b];
        const int local = c.causal ? (pos0 + i) / kBlock : c.block0 + blocks - 1;
        std::vector<int> list;
        const int most = std::min(c.topk, local + 1);
        if (local >= 0) list.push_back(local);
        for (int id : last)
          if (static_cast<int>(list.size()) < most && id < local &&
              std::uniform_real_distribution<float>(0, 1)(rng) < c.overlap)
            list.push_back(id);
        for (int tries = 0; static_cast<int>(list.size()) < most && tries < 1000; ++tries) {
          const int id = static_cast<int>(rng() % (local + 1));
          if (std::find(list.begin(), list.end(), id) == list.end()) list.push_back(id);
        }
        if (c.any_order)
          std::shuffle(list.begin(), list.end(), rng);
        else
          std::sort(list.begin(), list.end());
        last = list;
        int32_t* out = &ids[(size_t(h) * tokens + cu_q[b] + i) * c.topk];
        for (int s = 0; s < c.topk; ++s) out[s] = s < static_cast<int>(list.size()) ? list[s] : -1;
      }
    }
  }
  for (int t = 0; t < tokens; ++t) {
    int b = 0;
    while (b < sequences && t >= cu_q[b + 1]) ++b;
    if (b == sequences) {
      rows.insert(rows.end(), {t, 0, 0, 0, -1});
      continue;
    }
    const int i = t - cu_q[b];
    const int64_t pos0 =
        c.q_offset >= 0 ? c.q_offset : c.block0 * kBlock + c.kv_lens[b] - c.q_lens[b];
    const int64_t end = pos0 + i + 1 - int64_t{c.block0} * kBlock;
    const int visible =
        c.causal ? static_cast<int>(std::clamp<int64_t>(end, 0, c.kv_lens[b])) : c.kv_lens[b];
    rows.insert(rows.end(), {t, cu_k[b], visible, c.block0, c.paged ? b : -1});
  }

  // The call.
  const auto i32 = [](const std::vector<int32_t>& host, std::initializer_list<int64_t> shape) {
    return TensorView::contiguous(to_device(host), DType::kI32, shape);
  };
  SparseAttentionParams a;
  a.q = TensorView::contiguous(q, DType::kBF16, {tokens, heads_q, kDim});
  a.q.stride[0] = (heads_q + 1) * kDim;
  const std::initializer_list<int64_t> packed{keys, c.heads_kv, kDim},
      paged{pages, c.heads_kv, kBlock, kDim};
  a.k = TensorView::contiguous(k, DType::kBF16, c.paged ? paged : packed);
  a.v = TensorView::contiguous(v, DType::kBF16, c.paged ? paged : packed);
  a.ids = i32(ids, {c.heads_kv, tokens, c.topk});
  if (c.shared_list) a.ids.stride[0] = 0;
  a.batch.cu_seqlens_q = i32(cu_q, {sequences + 1});
  if (c.paged) {
    a.batch.seq_lens = i32(c.kv_lens, {sequences});
    a.batch.page_table = i32(table, {sequences, max_pages});
  } else {
    a.batch.cu_seqlens_k = i32(cu_k, {sequences + 1});
  }
  if (c.block0 > 0)
    a.batch.block_offset = i32(std::vector<int32_t>(sequences, c.block0), {sequences});
  if (c.q_offset >= 0)
    a.batch.q_offset = i32(std::vector<int32_t>(sequences, c.q_offset), {sequences});
  a.batch.causal = c.causal;
  a.softmax_scale = c.scale;
  const size_t out_size = size_t(tokens) * heads_q * kDim, out_bytes = c.f32_out ? 4 : 2;
  auto* o = device_array<uint8_t>(out_size * out_bytes);
  auto* lse = device_array<float>(size_t(tokens) * heads_q);
  must(cudaMemset(o, 0xff, out_size * out_bytes), "poison");
  must(cudaMemset(lse, 0xff, size_t(tokens) * heads_q * 4), "poison");
  a.o = TensorView::contiguous(o, c.f32_out ? DType::kF32 : DType::kBF16, {tokens, heads_q, kDim});
  a.lse = TensorView::contiguous(lse, DType::kF32, {tokens, heads_q});
  Plan plan;
  plan.problem.op = Op::kSparseAttention;
  plan.problem.dtype = DType::kBF16;
  plan.problem.layout = c.paged ? KvLayout::kPaged : KvLayout::kPacked;
  plan.problem.heads_kv = c.heads_kv;
  plan.problem.heads_q = heads_q;
  plan.problem.topk = c.topk;
  plan.problem.device = {DeviceKind::kCUDA, 0};
  plan.limits = {.max_batch = sequences,
                 .max_tokens = tokens,
                 .max_q_len = tokens,
                 .max_kv_len = int64_t{max_pages} * kBlock};
  plan.workspace_bytes = prefill::workspace_bytes(plan.problem, plan.limits, order);
  Workspace workspace{device_array<uint8_t>(plan.workspace_bytes),
                      static_cast<size_t>(plan.workspace_bytes)};
  must(cudaMemset(workspace.data, 0xa5, workspace.bytes), "poison");
  must(prefill::run(plan, a, workspace, order, nullptr), c.name);
  must(cudaDeviceSynchronize(), c.name);

  // What it should be.
  const int samples = tokens;
  Naive n{};
  n.q = q, n.k = k, n.v = v;
  n.ids = a.ids.at<int32_t>();
  n.pages = c.paged ? a.batch.page_table.at<int32_t>() : nullptr;
  n.q_token = a.q.stride[0], n.q_head = kDim;
  n.k_page = c.paged ? a.k.stride[0] : 0;
  n.k_head = a.k.stride[1];
  n.k_token = c.paged ? a.k.stride[2] : a.k.stride[0];
  n.ids_head = a.ids.stride[0], n.ids_token = a.ids.stride[1];
  n.topk = c.topk, n.group = c.group, n.max_pages = max_pages;
  n.scale = c.scale == 0 ? 1 / std::sqrt(128.0f) : c.scale;
  n.rows = to_device(rows);
  n.o = device_array<float>(size_t(samples) * heads_q * kDim);
  n.lse = device_array<float>(size_t(samples) * heads_q);
  naive<<<dim3(samples, heads_q), 128>>>(n);
  must(cudaDeviceSynchronize(), "naive");
  const auto want_o = to_host(n.o, out_size);
  const auto want_lse = to_host(n.lse, size_t(samples) * heads_q);
  const auto got_bytes = to_host(o, out_size * out_bytes);
  const auto got_lse = to_host(lse, want_lse.size());
  double error = 0, norm = 0, worst_lse = 0;
  size_t bad = 0, bad_lse = 0, first = SIZE_MAX;
  for (size_t i = 0; i < out_size; ++i) {
    float got = 0;
    if (c.f32_out)
      std::memcpy(&got, &got_bytes[4 * i], 4);
    else
      got = __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(got_bytes[2 * i]));
    const double d = got - want_o[i];
    if (!(std::abs(d) < 0.02 + 0.02 * std::abs(want_o[i]))) {
      ++bad;
      if (first == SIZE_MAX) first = i;
    } else {
      error += d * d;
    }
    norm += double(want_o[i]) * want_o[i];
  }
  for (size_t i = 0; i < want_lse.size(); ++i) {
    if (want_lse[i] == -INFINITY && got_lse[i] == -INFINITY) continue;
    const double d = std::abs(got_lse[i] - want_lse[i]);
    if (!(d < 2e-3))
      ++bad_lse;
    else
      worst_lse = std::max(worst_lse, d);
  }
  const bool ok = bad == 0 && bad_lse == 0;
  std::printf("%-4s %-8s %-28s o: rel err %.2e, %zu bad; lse: max err %.1e, %zu bad\n",
              ok ? "ok" : "BAD", name_of(order), c.name, std::sqrt(error / std::max(norm, 1e-30)),
              bad, worst_lse, bad_lse);
  if (first != SIZE_MAX) {
    const size_t t = first / kDim / heads_q;
    std::printf("     first: token %zu head %zu column %zu, want %g\n", t, first / kDim % heads_q,
                first % kDim, want_o[first]);
    size_t bad_rows = 0;
    for (size_t r = 0; r < size_t(tokens) * heads_q && bad_rows < 6; ++r) {
      size_t wrong = 0;
      float got0 = 0;
      for (int d = 0; d < kDim; ++d) {
        float got = 0;
        const size_t i = r * kDim + d;
        if (c.f32_out)
          std::memcpy(&got, &got_bytes[4 * i], 4);
        else
          got = __bfloat162float(reinterpret_cast<const __nv_bfloat16&>(got_bytes[2 * i]));
        if (d == 0) got0 = got;
        wrong += !(std::abs(got - want_o[i]) < 0.02 + 0.02 * std::abs(want_o[i]));
      }
      if (wrong) {
        ++bad_rows;
        std::printf("     row %zu/%zu: %zu of 128 wrong, got %g want %g, lse %g want %g\n",
                    r / heads_q, r % heads_q, wrong, got0, want_o[r * kDim], got_lse[r],
                    want_lse[r]);
      }
    }
  }
  return ok;
}

/// FLOPs of the visible pairs and of what the union kernel executes (two warpgroups of 64 rows a
/// tile), and bytes of its blocks.
struct Work {
  double useful = 0, executed = 0, loads = 0;
};
Work count_work(const std::vector<int32_t>& ids, int heads_kv, int tokens, int prefix, int topk,
                int group) {
  const int queries = 128 / group;
  const uint32_t half = (1u << queries / 2) - 1;
  Work work;
  for (int64_t tile = 0; tile < int64_t{heads_kv} * tokens / queries; ++tile) {
    std::vector<uint32_t> who((prefix + tokens + kBlock - 1) / kBlock);
    for (int q = 0; q < queries; ++q) {
      const int64_t row = tile * queries + q;
      for (int s = 0; s < topk && ids[row * topk + s] >= 0; ++s) {
        const int id = ids[row * topk + s];
        who[id] |= 1u << q;
        work.useful += 4.0 * group * kDim *
                       std::min<int64_t>(kBlock, prefix + row % tokens + 1 - int64_t{id} * kBlock);
      }
    }
    std::erase(who, 0u);
    for (uint32_t w : who)
      work.executed += 4.0 * 64 * kDim * kBlock * (((w & half) != 0) + ((w & ~half) != 0));
    work.loads += 65536.0 * static_cast<double>(who.size());
  }
  return work;
}

/// Milliseconds between two points of the default stream.
class Timer {
 public:
  Timer() {
    must(cudaEventCreate(&begin_), "event");
    must(cudaEventCreate(&end_), "event");
  }
  template <class Body>
  float operator()(const Body& body) {
    must(cudaEventRecord(begin_), "event");
    body();
    must(cudaEventRecord(end_), "event");
    must(cudaEventSynchronize(end_), "event");
    float ms = 0;
    must(cudaEventElapsedTime(&ms, begin_, end_), "time");
    return ms;
  }

 private:
  cudaEvent_t begin_{}, end_{};
};

double median(std::vector<float> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

/// One whole prefill in KV-outer order, step by step: ms of lists, attention and merge.
template <int kGroup>
std::array<float, 3> time_steps(const Plan& plan, const SparseAttentionParams& a,
                                Workspace workspace) {
  prefill::Call call{};
  must(prefill::make_call(plan, a, workspace, Order::kKvOuter, &call), "call");
  const prefill::Windows w = prefill::windows(plan.problem, plan.limits);
  const int64_t windows = (a.q.shape[0] + w.tokens - 1) / w.tokens;
  std::array<float, 3> ms{};
  Timer time;
  for (int64_t first = 0; first < windows; first += w.round) {
    const int64_t count = std::min(w.round, windows - first);
    ms[0] +=
        time([&] { must(prefill::launch_lists<kGroup>(call, w, first, count, nullptr), "lists"); });
    for (int64_t i = 0; i < count; ++i) {
      ms[1] +=
          time([&] { must(prefill::launch_blocks<kGroup>(call, w, first, i, nullptr), "blocks"); });
      ms[2] += time([&] {
        must((prefill::launch_merge<kGroup, __nv_bfloat16>(call, w, first, i, nullptr)), "merge");
      });
    }
  }
  return ms;
}

/// Times one prefill of `tokens` tokens behind `prefix`, M3's shape (or heads_kv / group of it), in
/// both orders by turns.
void time_case(const char* name, int tokens, int prefix, int heads_kv, int group,
               const std::vector<int32_t>* real) {
  constexpr int kWarmUps = 5, kRepeats = 20;
  const int heads_q = heads_kv * group, topk = 16;
  const auto random_bf16 = [&](size_t count, uint64_t seed) {
    auto* p = device_array<__nv_bfloat16>(count);
    fill_random<<<1024, 256>>>(p, count, seed);
    return p;
  };
  const size_t q_size = size_t(tokens) * heads_q * kDim,
               k_size = size_t(prefix + tokens) * heads_kv * kDim;
  SparseAttentionParams a;
  a.q = TensorView::contiguous(random_bf16(q_size, 1), DType::kBF16, {tokens, heads_q, kDim});
  a.k = TensorView::contiguous(random_bf16(k_size, 2), DType::kBF16,
                               {prefix + tokens, heads_kv, kDim});
  a.v = TensorView::contiguous(random_bf16(k_size, 3), DType::kBF16,
                               {prefix + tokens, heads_kv, kDim});
  int32_t* ids = device_array<int32_t>(size_t(heads_kv) * tokens * topk);
  if (real != nullptr)
    must(cudaMemcpy(ids, real->data(), real->size() * 4, cudaMemcpyHostToDevice), "ids");
  else
    random_ids<<<(heads_kv * tokens + 127) / 128, 128>>>(ids, heads_kv, tokens, prefix, topk, 77);
  a.ids = TensorView::contiguous(ids, DType::kI32, {heads_kv, tokens, topk});
  a.batch.cu_seqlens_q = TensorView::contiguous(to_device<int32_t>({0, tokens}), DType::kI32, {2});
  a.batch.cu_seqlens_k =
      TensorView::contiguous(to_device<int32_t>({0, prefix + tokens}), DType::kI32, {2});
  auto* o = device_array<__nv_bfloat16>(q_size);
  auto* o_again = device_array<__nv_bfloat16>(q_size);
  a.lse = TensorView::contiguous(device_array<float>(size_t(tokens) * heads_q), DType::kF32,
                                 {tokens, heads_q});
  Plan plan;
  plan.problem.dtype = DType::kBF16;
  plan.problem.heads_kv = heads_kv;
  plan.problem.heads_q = heads_q;
  plan.problem.device = {DeviceKind::kCUDA, 0};
  plan.limits = {
      .max_batch = 1, .max_tokens = tokens, .max_q_len = tokens, .max_kv_len = prefix + tokens};
  plan.workspace_bytes = prefill::workspace_bytes(plan.problem, plan.limits, Order::kKvOuter);
  Workspace workspace{device_array<uint8_t>(plan.workspace_bytes),
                      static_cast<size_t>(plan.workspace_bytes)};

  const auto host_ids = to_host(ids, size_t(heads_kv) * tokens * topk);
  const Work work = count_work(host_ids, heads_kv, tokens, prefix, topk, group);
  const auto run_to = [&](__nv_bfloat16* out, Order order) {
    a.o = TensorView::contiguous(out, DType::kBF16, {tokens, heads_q, kDim});
    must(prefill::run(plan, a, workspace, order, nullptr), name);
  };

  Timer time;
  std::array<std::vector<float>, kOrders.size()> times;
  std::array<std::vector<float>, 3> steps;
  for (int i = 0; i < kWarmUps + kRepeats; ++i) {
    for (size_t n = 0; n < kOrders.size(); ++n) {
      const float ms = time([&] { run_to(o, kOrders[n]); });
      if (i >= kWarmUps) times[n].push_back(ms);
    }
  }
  for (int i = 0; i < 5; ++i) {
    const auto ms =
        group == 16 ? time_steps<16>(plan, a, workspace) : time_steps<8>(plan, a, workspace);
    for (size_t step = 0; step < steps.size(); ++step) steps[step].push_back(ms[step]);
  }

  auto* different = device_array<unsigned long long>(1);
  for (size_t n = 0; n < kOrders.size(); ++n) {
    // Three bitwise equal repeats.
    must(cudaMemset(different, 0, 8), "memset");
    run_to(o, kOrders[n]);
    for (int i = 0; i < 2; ++i) {
      run_to(o_again, kOrders[n]);
      count_different<<<1024, 256>>>(reinterpret_cast<uint16_t*>(o),
                                     reinterpret_cast<uint16_t*>(o_again), q_size, different);
    }
    const auto bits = to_host(different, 1)[0];
    const auto [least, most] = std::minmax_element(times[n].begin(), times[n].end());
    const double ms = median(times[n]);
    std::printf("%-20s %-8s %8.3f ms (%.3f..%.3f)  useful %5.1f TFLOP/s", name, name_of(kOrders[n]),
                ms, *least, *most, work.useful / ms * 1e-9);
    if (kOrders[n] == Order::kUnion)
      std::printf("  executed %5.1f  blocks %4.2f TB/s  executed / useful %.2f",
                  work.executed / ms * 1e-9, work.loads / ms * 1e-9, work.executed / work.useful);
    else
      std::printf("  lists %.3f  attention %.3f  merge %.3f ms alone; %.0f MiB of workspace",
                  median(steps[0]), median(steps[1]), median(steps[2]),
                  static_cast<double>(plan.workspace_bytes) / (1 << 20));
    std::printf("  %s\n", bits == 0 ? "same bits" : "DIFFERENT BITS");
  }
  for (const void* p :
       {a.q.data, a.k.data, a.v.data, (void*)ids, (void*)o, (void*)o_again, workspace.data})
    cudaFree(const_cast<void*>(p));
}

int check_all() {
  int bad = 0;
  const std::vector<Case> cases{
      {.name = "one tile", .q_lens = {8}, .kv_lens = {8}},
      {.name = "one block", .q_lens = {128}, .kv_lens = {128}},
      {.name = "plain 512", .q_lens = {512}, .kv_lens = {512}},
      {.name = "plain 4096", .q_lens = {4096}, .kv_lens = {4096}},
      {.name = "G 8", .group = 8, .q_lens = {4096}, .kv_lens = {4096}},
      {.name = "ragged", .q_lens = {1, 300, 77, 1000}, .kv_lens = {1, 300, 77, 1000}},
      {.name = "ragged, prefix", .q_lens = {100, 3, 257}, .kv_lens = {3000, 2500, 4097}},
      {.name = "ragged, prefix, paged",
       .q_lens = {100, 3, 257, 0, 9},
       .kv_lens = {3000, 2500, 4097, 50, 0},
       .paged = true},
      {.name = "paged, any order, G 8",
       .group = 8,
       .q_lens = {100, 3, 257},
       .kv_lens = {3000, 2500, 4097},
       .paged = true,
       .any_order = true},
      {.name = "f32 out, padded",
       .q_lens = {333, 70},
       .kv_lens = {400, 1999},
       .f32_out = true,
       .padded = true},
      {.name = "not causal", .q_lens = {333, 70}, .kv_lens = {400, 3999}, .causal = false},
      {.name = "scattered", .q_lens = {777}, .kv_lens = {7777}, .any_order = true, .overlap = 0},
      {.name = "scattered, G 8", .group = 8, .q_lens = {777}, .kv_lens = {7777}, .overlap = 0},
      {.name = "K 5, scale 0.3", .topk = 5, .q_lens = {500}, .kv_lens = {900}, .scale = 0.3f},
      {.name = "shard", .q_lens = {400}, .kv_lens = {1300}, .block0 = 20},
      {.name = "shard, offset",
       .q_lens = {400},
       .kv_lens = {1300},
       .paged = true,
       .block0 = 5,
       .q_offset = 1500},
      {.name = "shared list", .q_lens = {512}, .kv_lens = {2512}, .shared_list = true},
      {.name = "16 heads, 1", .heads_kv = 1, .q_lens = {2000}, .kv_lens = {2000}},
      {.name = "many sequences",
       .q_lens = std::vector<int>(70, 13),
       .kv_lens = std::vector<int>(70, 900)},
      {.name = "three windows, G 8",
       .heads_kv = 1,
       .group = 8,
       .q_lens = {5000, 1, 4500},
       .kv_lens = {5000, 3000, 6000},
       .overlap = 0},
  };
  for (const Case& c : cases)
    for (const Order order : kOrders) bad += !check_case(c, order);
  std::printf("%zu cases in both orders, %d bad\n", cases.size(), bad);
  return bad > 0 ? 1 : 0;
}

int time_all(int argc, char** argv) {
  std::vector<int32_t> real;
  int heads = 0, tokens = 0;
  if (argc == 5) {
    heads = std::atoi(argv[3]), tokens = std::atoi(argv[4]);
    std::vector<uint8_t> packed(size_t(heads) * tokens * 16);
    std::FILE* file = std::fopen(argv[2], "rb");
    if (file == nullptr || std::fread(packed.data(), 1, packed.size(), file) != packed.size()) {
      std::printf("FAILED to read %s\n", argv[2]);
      return 1;
    }
    std::fclose(file);
    for (size_t i = 0; i < packed.size(); ++i) {
      const bool none = packed[i] == 255 && i / 16 % tokens < 255 * kBlock;
      real.push_back(none ? -1 : packed[i]);
    }
  }
  const auto part = [&](int first, int count, int length) {
    std::vector<int32_t> out;
    for (int h = first; h < first + count; ++h)
      out.insert(out.end(), real.begin() + size_t(h) * tokens * 16,
                 real.begin() + (size_t(h) * tokens + length) * 16);
    return out;
  };
  if (!real.empty()) {
    for (int first = 0; first + 4 <= heads; first += 4) {
      const auto lists = part(first, 4, tokens);
      time_case(("real, heads " + std::to_string(first)).c_str(), tokens, 0, 4, 16, &lists);
    }
    const auto lists8 = part(0, 4, 8192);
    time_case("real, 8K", 8192, 0, 4, 16, &lists8);
    const auto lists1 = part(0, 1, tokens);
    time_case("real, 16/1", tokens, 0, 1, 16, &lists1);
    time_case("real, 8/1", tokens, 0, 1, 8, &lists1);
  }
  time_case("random 8K", 8192, 0, 4, 16, nullptr);
  time_case("random 32K", 32768, 0, 4, 16, nullptr);
  time_case("random 32K, 8/1", 32768, 0, 1, 8, nullptr);
  time_case("random 128K", 131072, 0, 4, 16, nullptr);
  time_case("128 over 128K", 128, 131072, 4, 16, nullptr);
  time_case("1K over 512K", 1024, 524288, 4, 16, nullptr);
  time_case("1K over 1M", 1024, 1048576, 4, 16, nullptr);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  return argc > 1 && std::strcmp(argv[1], "time") == 0 ? time_all(argc, argv) : check_all();
}
