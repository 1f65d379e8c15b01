// Development driver of the index kernels: checks them against plain loops, then times them.
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a -Isrc -Iinclude -cudart static
//        dev/index_bench.cu src/cuda/tensor_map.cc -o index_bench
//   index_bench [check|time]
//
// Checks with small integers as q and k are exact in any order of sums and full of ties: ids must
// be equal. With normal numbers the score of the worst chosen block must reach that of the best
// left out.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/sm90/index/launch.cu"

namespace msa::cuda::sm90::index {
namespace {

constexpr float kMinusInf = -std::numeric_limits<float>::infinity();

void require(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  std::printf("FAILED %s: %s\n", what, cudaGetErrorString(result));
  std::exit(1);
}
void require(const Status& status) {
  if (status.ok()) return;
  std::printf("FAILED: %s\n", status.message().c_str());
  std::exit(1);
}

template <class T>
struct Buffer {
  T* data = nullptr;
  size_t count = 0;
  explicit Buffer(size_t n) : count(n) {
    require(cudaMalloc(&data, std::max<size_t>(n, 1) * sizeof(T)), "cudaMalloc");
  }
  explicit Buffer(const std::vector<T>& host) : Buffer(host.size()) {
    require(cudaMemcpy(data, host.data(), count * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(data); }
  std::vector<T> host() const {
    std::vector<T> out(count);
    require(cudaMemcpy(out.data(), data, count * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return out;
  }
  void poison() { require(cudaMemset(data, 0xcd, count * sizeof(T)), "poison"); }
};

__device__ uint32_t mix(uint64_t x) {
  x ^= x >> 33, x *= 0xff51afd7ed558ccdULL, x ^= x >> 33, x *= 0xc4ceb9fe1a85ec53ULL, x ^= x >> 33;
  return static_cast<uint32_t>(x);
}
/// Integers -3..3, or about normal numbers.
__global__ void fill(__nv_bfloat16* out, size_t count, uint64_t seed, bool integers) {
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count;
       i += size_t{gridDim.x} * blockDim.x) {
    const uint32_t bits = mix(i + (seed << 40));
    float x = static_cast<float>(static_cast<int>(bits % 7) - 3);
    if (!integers) {
      const float u = (static_cast<float>(bits >> 8) + 1) * 0x1p-24F;
      const float v = static_cast<float>(mix(bits + seed) >> 8) * 0x1p-24F;
      x = sqrtf(-2 * logf(u)) * cospif(2 * v);
    }
    out[i] = __float2bfloat16(x);
  }
}

/// scores[row, j], row = token*Hi + head; a CTA per row. key_row[b*stride + s]: where key s lies.
__global__ void naive_scores(const __nv_bfloat16* q, const __nv_bfloat16* k, const int* sequence,
                             const int* visible, const int64_t* key_row, int64_t stride, int heads,
                             int blocks, float* scores) {
  __shared__ float query[128];
  const int row = blockIdx.x, token = row / heads;
  query[threadIdx.x] = __bfloat162float(q[int64_t{row} * 128 + threadIdx.x]);
  __syncthreads();
  for (int j = threadIdx.x; j < blocks; j += blockDim.x) {
    float best = kMinusInf;
    for (int s = 128 * j; s < min(128 * (j + 1), visible[token]); ++s) {
      const int64_t at = key_row[sequence[token] * stride + s];
      if (at < 0) continue;
      float sum = 0;
      for (int d = 0; d < 128; ++d) sum += query[d] * __bfloat162float(k[at * 128 + d]);
      if (sum > best) best = sum;
    }
    scores[int64_t{row} * blocks + j] = best;
  }
}

struct Case {
  std::string name;
  std::vector<int> q_len, kv_len;
  int heads = 4, topk = 16, init = 0, local = 1;
  bool paged = false, integers = true, nans = false, bad_pages = false;
  int padding = 0;  // rows of q behind the last sequence
  std::vector<int> block_offset{}, q_offset{};
  int64_t more_kv = 0;  // limits beyond the actual lengths
};

/// One batch on the device.
struct Instance {
  Case c;
  int64_t tokens = 0, keys = 0, max_kv = 1, max_q = 1;
  int max_pages = 0, pages = 0;
  std::vector<int> cu_q{0}, cu_k{0}, table;
  std::vector<int> sequence, visible, position;  // per token
  std::vector<int64_t> key_row;                  // [B, max_kv]
  Plan plan;
  Batch batch;
  Buffer<__nv_bfloat16> q, k;
  Buffer<int> d_cu_q, d_cu_k, d_kv, d_table, d_block_offset, d_q_offset;

  static int64_t total(const Case& c) {
    int64_t sum = c.padding;
    for (int x : c.q_len) sum += x;
    return sum;
  }
  static int64_t key_rows(const Case& c) {
    int64_t sum = 0;
    for (int x : c.kv_len) sum += c.paged ? (x + 127) / 128 * 128 : x;
    return sum + (c.paged ? 256 : 0);
  }
  static std::vector<int> sums(const std::vector<int>& lengths) {
    std::vector<int> out{0};
    for (int x : lengths) out.push_back(out.back() + x);
    return out;
  }
  static std::vector<int> page_table(const Case& c, int* max_pages, int* pages) {
    *max_pages = 1;
    *pages = static_cast<int>(key_rows(c) / 128);
    for (int x : c.kv_len) *max_pages = std::max(*max_pages, (x + 127) / 128);
    std::vector<int> order(*pages), out(c.kv_len.size() * *max_pages, 1 << 30);
    for (int i = 0; i < *pages; ++i) order[i] = i;
    std::mt19937 engine(7);
    std::shuffle(order.begin(), order.end(), engine);
    size_t next = 0;
    for (size_t b = 0; b < c.kv_len.size(); ++b)
      for (int j = 0; j < (c.kv_len[b] + 127) / 128; ++j)
        out[b * *max_pages + j] =
            c.bad_pages && j % 5 == 2 ? (j % 2 ? -1 : *pages + 3) : order[next++];
    return out;
  }

  explicit Instance(const Case& given, uint64_t seed = 1)
      : c(given),
        tokens(total(c)),
        keys(key_rows(c)),
        cu_q(sums(c.q_len)),
        cu_k(sums(c.kv_len)),
        table(page_table(c, &max_pages, &pages)),
        q(tokens * c.heads * 128),
        k(keys * 128),
        d_cu_q(cu_q),
        d_cu_k(cu_k),
        d_kv(c.kv_len),
        d_table(table),
        d_block_offset(c.block_offset),
        d_q_offset(c.q_offset) {
    fill<<<1024, 256>>>(q.data, q.count, 2 * seed, c.integers);
    fill<<<1024, 256>>>(k.data, k.count, 2 * seed + 1, c.integers);
    for (int x : c.kv_len) max_kv = std::max<int64_t>(max_kv, x);
    for (int x : c.q_len) max_q = std::max<int64_t>(max_q, x);
    const int sequences = static_cast<int>(c.q_len.size());
    Problem p;
    p.op = Op::kIndexSelect;
    p.dtype = DType::kBF16;
    p.layout = c.paged ? KvLayout::kPaged : KvLayout::kPacked;
    p.heads_q = 16 * c.heads, p.heads_kv = c.heads, p.topk = c.topk;
    p.init_blocks = c.init, p.local_blocks = c.local;
    plan = {.backend = nullptr,
            .problem = p,
            .limits = {.max_batch = sequences,
                       .max_tokens = tokens,
                       .max_q_len = max_q,
                       .max_kv_len = max_kv + c.more_kv},
            .workspace_bytes = 0};
    plan.workspace_bytes = workspace_bytes(p, plan.limits);
    const auto ints = [](Buffer<int>& buffer, std::initializer_list<int64_t> shape) {
      return TensorView::contiguous(buffer.data, DType::kI32, shape);
    };
    batch.cu_seqlens_q = ints(d_cu_q, {sequences + 1});
    if (c.paged) {
      batch.seq_lens = ints(d_kv, {sequences});
      batch.page_table = ints(d_table, {sequences, max_pages});
    } else {
      batch.cu_seqlens_k = ints(d_cu_k, {sequences + 1});
    }
    if (!c.block_offset.empty()) batch.block_offset = ints(d_block_offset, {sequences});
    if (!c.q_offset.empty()) batch.q_offset = ints(d_q_offset, {sequences});
  }

  TensorView q_view() {
    return TensorView::contiguous(q.data, DType::kBF16, {tokens, c.heads, 128});
  }
  TensorView k_view() {
    return c.paged ? TensorView::contiguous(k.data, DType::kBF16, {pages, 128, 128})
                   : TensorView::contiguous(k.data, DType::kBF16, {keys, 128});
  }
  int block0(int b) const { return c.block_offset.empty() ? 0 : c.block_offset[b]; }

  /// What every token sees; for checks.
  void describe() {
    const int sequences = static_cast<int>(c.q_len.size());
    key_row.assign(sequences * max_kv, -1);
    sequence.assign(tokens, 0), visible.assign(tokens, 0), position.assign(tokens, -1);
    for (int b = 0; b < sequences; ++b) {
      for (int s = 0; s < c.kv_len[b]; ++s) {
        const int page = c.paged ? table[b * max_pages + s / 128] : 0;
        const bool exists = page >= 0 && (!c.paged || page < pages);
        key_row[b * max_kv + s] = !exists   ? -1
                                  : c.paged ? int64_t{page} * 128 + s % 128
                                            : cu_k[b] + s;
      }
      for (int i = 0; i < c.q_len[b]; ++i) {
        const int t = cu_q[b] + i;
        const int pos =
            c.q_offset.empty() ? block0(b) * 128 + c.kv_len[b] - c.q_len[b] + i : c.q_offset[b] + i;
        sequence[t] = b, position[t] = pos;
        visible[t] = std::clamp(pos + 1 - block0(b) * 128, 0, c.kv_len[b]);
      }
    }
  }
  /// NaN in single keys, in whole blocks, and in every row that no sequence owns.
  void plant_nans() {
    std::vector<__nv_bfloat16> host(k.count);
    require(cudaMemcpy(host.data(), k.data, k.count * 2, cudaMemcpyDeviceToHost), "copy");
    std::vector<bool> owned(keys);
    for (int64_t row : key_row)
      if (row >= 0) owned[row] = true;
    const auto nan = __float2bfloat16(NAN);
    for (int64_t row = 0; row < keys; ++row)
      if (!owned[row]) std::fill_n(host.begin() + row * 128, 128, nan);
    for (size_t i = 0; i < key_row.size(); ++i)
      if (key_row[i] >= 0 && (i % 37 == 5 || i / 128 % 11 == 3))
        host[key_row[i] * 128 + i % 128] = nan;
    require(cudaMemcpy(k.data, host.data(), k.count * 2, cudaMemcpyHostToDevice), "copy");
  }
};

int failures = 0;

void verdict(const std::string& name, int64_t wrong, const std::string& first) {
  std::printf("%s %s%s%s\n", wrong == 0 ? "ok    " : "WRONG ", name.c_str(), wrong ? ": " : "",
              wrong ? (std::to_string(wrong) + " wrong, first " + first).c_str() : "");
  if (wrong != 0) ++failures;
}

/// ids and scores of one row by the specification; `scores` of the given blocks.
void naive_select(const float* scores, int visible_blocks, int block0, int last, const Case& c,
                  std::vector<int>* ids, std::vector<float>* values) {
  std::vector<std::pair<float, int>> order;
  for (int j = 0; j < visible_blocks; ++j) {
    const int id = block0 + j;
    const bool forced = id < c.init || (id > last - c.local && id <= last);
    order.push_back({forced ? std::numeric_limits<float>::infinity() : scores[j],
                     forced ? id - (1 << 30) : id});
  }
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return a.second < 0 || b.second < 0 ? a.second < b.second
           : a.first != b.first         ? a.first > b.first
                                        : a.second < b.second;
  });
  order.resize(std::min<size_t>(order.size(), c.topk));
  for (auto& entry : order)
    if (entry.second < 0) entry.second += 1 << 30;
  std::sort(order.begin(), order.end(),
            [](const auto& a, const auto& b) { return a.second < b.second; });
  ids->assign(c.topk, -1), values->assign(c.topk, kMinusInf);
  for (size_t i = 0; i < order.size(); ++i)
    (*ids)[i] = order[i].second, (*values)[i] = order[i].first;
}

void check(const Case& c) {
  Instance x(c);
  x.describe();
  if (c.nans) x.plant_nans();
  const int blocks = static_cast<int>((x.max_kv + 127) / 128);
  const int64_t rows = x.tokens * c.heads;
  Buffer<int> sequence(x.sequence), visible(x.visible);
  Buffer<int64_t> key_row(x.key_row);
  Buffer<float> expected(rows * blocks);
  naive_scores<<<static_cast<unsigned>(rows), 128>>>(x.q.data, x.k.data, sequence.data,
                                                     visible.data, key_row.data, x.max_kv, c.heads,
                                                     blocks, expected.data);
  require(cudaDeviceSynchronize(), "naive_scores");
  const std::vector<float> want = expected.host();

  // index_scores: [Hi,T,blocks + 3] with strides of its own.
  const int columns = blocks + 3;
  Buffer<float> scores(rows * columns);
  scores.poison();
  IndexScoresParams scores_params{.q_idx = x.q_view(), .k_idx = x.k_view(), .batch = x.batch};
  scores_params.scores =
      TensorView::contiguous(scores.data, DType::kF32, {c.heads, x.tokens, columns});
  Plan scores_plan = x.plan;
  scores_plan.problem.op = Op::kIndexScores;
  require(run(scores_plan, scores_params, {}, nullptr));
  require(cudaDeviceSynchronize(), "index_scores");
  const std::vector<float> got_scores = scores.host();
  int64_t wrong = 0;
  std::string first;
  double worst = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = row / c.heads, r = row % c.heads;
    for (int j = 0; j < columns; ++j) {
      const float a = got_scores[(r * x.tokens + t) * columns + j];
      const float b = j < blocks ? want[row * blocks + j] : kMinusInf;
      const bool same = a == b || (!c.integers && std::abs(a - b) <= 1e-3F * (1 + std::abs(b)));
      if (a != b) worst = std::max<double>(worst, std::abs(a - b));
      if (same) continue;
      if (wrong++ == 0)
        first = "token " + std::to_string(t) + " head " + std::to_string(r) + " block " +
                std::to_string(j) + " got " + std::to_string(a) + " expected " + std::to_string(b);
    }
  }
  verdict(c.name + " index_scores" +
              (c.integers ? "" : " (largest difference " + std::to_string(worst) + ")"),
          wrong, first);

  // index_select, three times.
  Buffer<int> ids(rows * c.topk);
  Buffer<float> values(rows * c.topk);
  Buffer<uint8_t> workspace(x.plan.workspace_bytes);
  IndexSelectParams params{.q_idx = x.q_view(), .k_idx = x.k_view(), .batch = x.batch};
  params.ids = TensorView::contiguous(ids.data, DType::kI32, {c.heads, x.tokens, c.topk});
  params.scores = TensorView::contiguous(values.data, DType::kF32, {c.heads, x.tokens, c.topk});
  std::vector<int> got_ids;
  std::vector<float> got_values;
  bool same = true;
  for (int repeat = 0; repeat < 3; ++repeat) {
    ids.poison(), values.poison(), workspace.poison();
    require(run(x.plan, params, {workspace.data, workspace.count}, nullptr));
    require(cudaDeviceSynchronize(), "index_select");
    const auto again = ids.host();
    const auto again_values = values.host();
    if (repeat > 0)
      same = same && again == got_ids &&
             std::memcmp(again_values.data(), got_values.data(), 4 * got_values.size()) == 0;
    got_ids = again, got_values = again_values;
  }
  wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t t = row / c.heads, r = row % c.heads;
    const int pos = x.position[t], b = x.sequence[t], visible_blocks = (x.visible[t] + 127) / 128;
    std::vector<int> expected_ids;
    std::vector<float> expected_values;
    // Near ties: judge normal numbers by this backend's own scores.
    const float* row_scores =
        c.integers ? &want[row * blocks] : &got_scores[(r * x.tokens + t) * columns];
    naive_select(row_scores, visible_blocks, x.block0(b), pos < 0 ? -1 : pos / 128, c,
                 &expected_ids, &expected_values);
    for (int i = 0; i < c.topk; ++i) {
      const int64_t at = (r * x.tokens + t) * c.topk + i;
      if (got_ids[at] == expected_ids[i] && got_values[at] == expected_values[i]) continue;
      if (wrong++ == 0) {
        first = "token " + std::to_string(t) + " (position " + std::to_string(pos) + ") head " +
                std::to_string(r) + " slot " + std::to_string(i) + " got " +
                std::to_string(got_ids[at]) + " / " + std::to_string(got_values[at]) +
                " expected " + std::to_string(expected_ids[i]) + " / " +
                std::to_string(expected_values[i]);
      }
    }
  }
  if (!same) ++wrong, first = "repeats differ; " + first;
  const bool narrow = is_narrow(x.plan.problem, x.plan.limits);
  verdict(c.name + " index_select" +
              (narrow ? " (narrow)"
                      : " (splits " + std::to_string(splits(x.plan.problem, x.plan.limits)) + ")"),
          wrong, first);
}

void check_select(int heads, int tokens, int blocks, int topk, int init, int local, int kind,
                  bool strided) {
  // kind 0: few values, many ties; 1: normal; 2: all equal; 3: ascending; 4: NaN and -inf; 5:
  // descending
  std::mt19937 engine(static_cast<uint32_t>(blocks * 10 + kind));
  std::normal_distribution<float> normal;
  const int64_t token_stride = strided ? blocks * 2 + 5 : blocks, step = strided ? 2 : 1;
  std::vector<float> scores(static_cast<size_t>(heads) * tokens * token_stride);
  for (auto& s : scores) s = normal(engine);
  std::vector<int> valid(tokens);
  for (auto& v : valid) v = static_cast<int>(engine() % (blocks + 1));
  for (int r = 0; r < heads; ++r)
    for (int t = 0; t < tokens; ++t)
      for (int j = 0; j < blocks; ++j) {
        float& s = scores[(int64_t{r} * tokens + t) * token_stride + j * step];
        if (kind == 0)
          s = static_cast<float>(static_cast<int>(engine() % 5)) * (engine() % 2 ? 1.F : -1.F);
        if (kind == 2) s = 1.5F;
        if (kind == 3) s = static_cast<float>(j);
        if (kind == 5) s = static_cast<float>(-j);
        if (kind == 4 && engine() % 8 != 0) s = engine() % 2 ? NAN : kMinusInf;
      }
  Buffer<float> d_scores(scores);
  Buffer<int> d_valid(valid), ids(static_cast<size_t>(heads) * tokens * topk);
  ids.poison();
  Plan plan;
  plan.problem.op = Op::kSelectBlocks;
  plan.problem.heads_kv = heads, plan.problem.topk = topk, plan.problem.init_blocks = init,
  plan.problem.local_blocks = local;
  SelectBlocksParams params;
  params.scores = TensorView::contiguous(d_scores.data, DType::kF32, {heads, tokens, blocks});
  params.scores.stride = {tokens * token_stride, token_stride, step};
  params.num_valid_blocks = TensorView::contiguous(d_valid.data, DType::kI32, {tokens});
  params.ids = TensorView::contiguous(ids.data, DType::kI32, {heads, tokens, topk});
  require(run(plan, params, {}, nullptr));
  require(cudaDeviceSynchronize(), "select_blocks");
  const auto got = ids.host();
  int64_t wrong = 0;
  std::string first;
  Case c;
  c.topk = topk, c.init = init, c.local = local;
  for (int r = 0; r < heads; ++r)
    for (int t = 0; t < tokens; ++t) {
      std::vector<float> row(blocks), values;
      std::vector<int> expected;
      for (int j = 0; j < blocks; ++j) {
        row[j] = scores[(int64_t{r} * tokens + t) * token_stride + j * step];
        if (std::isnan(row[j])) row[j] = kMinusInf;
      }
      naive_select(row.data(), valid[t], 0, valid[t] - 1, c, &expected, &values);
      for (int i = 0; i < topk; ++i) {
        const int a = got[(int64_t{r} * tokens + t) * topk + i];
        if (a != expected[i] && wrong++ == 0)
          first = "head " + std::to_string(r) + " token " + std::to_string(t) + " slot " +
                  std::to_string(i) + " valid " + std::to_string(valid[t]) + " got " +
                  std::to_string(a) + " expected " + std::to_string(expected[i]);
      }
    }
  verdict("select_blocks " + std::to_string(heads * tokens) + " x " + std::to_string(blocks) +
              " K " + std::to_string(topk) + " init " + std::to_string(init) + " local " +
              std::to_string(local) + " kind " + std::to_string(kind) + (strided ? " strided" : ""),
          wrong, first);
}

/// Median and spread of `count` timings of body(i), each over `inner` launches, in us.
struct Timing {
  double median, low, high;
};
Timing time_us(int count, int inner, const std::function<void(int)>& body) {
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  std::vector<double> all;
  int n = 0;
  for (int repeat = -2; repeat < count; ++repeat) {
    cudaEventRecord(start, nullptr);
    for (int i = 0; i < inner; ++i) body(n++);
    cudaEventRecord(stop, nullptr);
    require(cudaEventSynchronize(stop), "timing");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (repeat >= 0) all.push_back(1000.0 * ms / inner);
  }
  std::sort(all.begin(), all.end());
  return {all[all.size() / 2], all.front(), all.back()};
}

/// The same from replays of a graph that holds `inner` calls.
Timing graph_us(int count, int inner, const std::function<void(int, cudaStream_t)>& body) {
  cudaStream_t stream;
  cudaStreamCreate(&stream);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  for (int i = 0; i < inner; ++i) body(i, stream);
  require(cudaStreamSynchronize(stream), "before capture");
  require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (int i = 0; i < inner; ++i) body(i, stream);
  require(cudaStreamEndCapture(stream, &graph), "end capture");
  require(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t start, stop;
  cudaEventCreate(&start), cudaEventCreate(&stop);
  std::vector<double> all;
  for (int repeat = -3; repeat < count; ++repeat) {
    cudaEventRecord(start, stream);
    cudaGraphLaunch(exec, stream);
    cudaEventRecord(stop, stream);
    require(cudaEventSynchronize(stop), "replay");
    float ms = 0;
    cudaEventElapsedTime(&ms, start, stop);
    if (repeat >= 0) all.push_back(1000.0 * ms / inner);
  }
  std::sort(all.begin(), all.end());
  return {all[all.size() / 2], all.front(), all.back()};
}

double visible_pairs(const Case& c) {
  double sum = 0;
  for (size_t b = 0; b < c.q_len.size(); ++b) {
    const double q = c.q_len[b], n = c.kv_len[b];
    sum += q * (n - q) + q * (q + 1) / 2;
  }
  return sum;
}

/// index_select of `c`, over `copies` sets of keys in turn.
void time_index(const Case& c, int copies, int repeats) {
  std::vector<std::unique_ptr<Instance>> all;
  for (int i = 0; i < copies; ++i) all.push_back(std::make_unique<Instance>(c, i + 1));
  Instance& x = *all[0];
  Buffer<int> ids(x.tokens * c.heads * c.topk);
  Buffer<uint8_t> workspace(x.plan.workspace_bytes);
  const auto call = [&](int i, cudaStream_t stream) {
    Instance& y = *all[i % copies];
    IndexSelectParams params{.q_idx = y.q_view(), .k_idx = y.k_view(), .batch = y.batch};
    params.ids = TensorView::contiguous(ids.data, DType::kI32, {c.heads, x.tokens, c.topk});
    require(run(y.plan, params, {workspace.data, workspace.count}, stream));
  };
  const Timing t = graph_us(repeats, std::max(copies, c.q_len[0] <= 2048 ? 8 : 1), call);
  const double flops = 2.0 * c.heads * 128 * visible_pairs(c);
  double bytes = 0;
  for (int n : c.kv_len) bytes += 256.0 * n;
  std::printf(
      "%-28s %10.1f us (%.1f-%.1f)  %6.1f TFLOP/s  %6.3f TB/s  splits %d  workspace %.1f MB\n",
      c.name.c_str(), t.median, t.low, t.high, flops / t.median * 1e-6, bytes / t.median * 1e-6,
      is_narrow(x.plan.problem, x.plan.limits) ? 0 : splits(x.plan.problem, x.plan.limits),
      1e-6 * static_cast<double>(x.plan.workspace_bytes));
}

/// The maxima, but no lists.
template <class Shape>
struct MaxSink {
  struct Storage {};
  float best;
  int* ids;
  __device__ MaxSink(Storage&, const ScoreArguments& a) : ids(a.out.ids) {}
  __device__ void begin(const Unit&, int) { best = kMinusInf; }
  __device__ void take(const Unit&, int, float s) { best = fmaxf(best, s); }
  __device__ void end(const Unit&, int) {
    if (best == 12345.F) *ids = 1;
  }
};

template <class Shape, class Sink>
void time_variant(const char* name, const Case& c, int repeats) {
  Instance x(c);
  Buffer<int> ids(x.tokens * c.heads * c.topk);
  ScoreArguments args{};
  require(score_arguments(x.plan.problem, x.q_view(), x.k_view(), x.batch, Shape::kWarpgroupRows,
                          Shape::kRows, &args));
  args.out.ids = ids.data;
  args.out.ids_head_stride = x.tokens * c.topk, args.out.ids_token_stride = c.topk;
  const Timing t = time_us(repeats, 1, [&](int) {
    require((launch_scores<Shape, OneTile<Shape::kRows>, Sink>(
        static_cast<uint32_t>(args.grid.tiles), args, nullptr)));
  });
  std::printf("%-28s %10.1f us (%.1f-%.1f)  %6.1f TFLOP/s  [%s]\n", c.name.c_str(), t.median, t.low,
              t.high, 2.0 * c.heads * 128 * visible_pairs(c) / t.median * 1e-6, name);
}

void time_select(int blocks, int repeats) {
  const int heads = 4, tokens = 16384;
  Buffer<float> scores(int64_t{heads} * tokens * blocks);
  // random bits of a bf16 pair make plausible floats
  fill<<<1024, 256>>>(reinterpret_cast<__nv_bfloat16*>(scores.data), scores.count * 2, 5, false);
  Buffer<int> ids(int64_t{heads} * tokens * 16);
  Plan plan;
  plan.problem.op = Op::kSelectBlocks;
  SelectBlocksParams params;
  params.scores = TensorView::contiguous(scores.data, DType::kF32, {heads, tokens, blocks});
  params.ids = TensorView::contiguous(ids.data, DType::kI32, {heads, tokens, 16});
  const Timing t = time_us(repeats, 4, [&](int) { require(run(plan, params, {}, nullptr)); });
  std::printf("select_blocks 65536 x %-6d %10.1f us (%.1f-%.1f)  %6.3f TB/s\n", blocks, t.median,
              t.low, t.high, 4.0 * heads * tokens * blocks / t.median * 1e-6);
}

std::vector<int> many(int count, int value) { return std::vector<int>(count, value); }

void check_all() {
  check({.name = "one tile", .q_len = {64}, .kv_len = {4096}});
  check({.name = "whole 4000", .q_len = {4000}, .kv_len = {4000}});
  check({.name = "normal 2048/8192", .q_len = {2048}, .kv_len = {8192}, .integers = false});
  check({.name = "ragged packed",
         .q_len = {70, 0, 333, 1, 129},
         .kv_len = {5000, 300, 333, 2500, 7777},
         .padding = 77});
  check({.name = "ragged paged",
         .q_len = {70, 5, 333, 1, 129},
         .kv_len = {5000, 0, 333, 2500, 7777},
         .paged = true,
         .padding = 3});
  check({.name = "nans paged",
         .q_len = {70, 333, 129},
         .kv_len = {5000, 333, 7777},
         .paged = true,
         .nans = true});
  check({.name = "bad pages",
         .q_len = {170, 129},
         .kv_len = {5000, 7777},
         .paged = true,
         .bad_pages = true});
  check({.name = "Hi 1",
         .q_len = {700},
         .kv_len = {5001},
         .heads = 1,
         .topk = 7,
         .init = 2,
         .local = 3});
  check({.name = "Hi 2 local 0",
         .q_len = {300, 40},
         .kv_len = {5001, 40},
         .heads = 2,
         .topk = 16,
         .init = 0,
         .local = 0});
  check({.name = "Hi 8",
         .q_len = {300},
         .kv_len = {6000},
         .heads = 8,
         .topk = 12,
         .init = 1,
         .local = 2});
  check({.name = "shards",
         .q_len = {100, 90},
         .kv_len = {4000, 3000},
         .init = 3,
         .block_offset = {2, 50}});
  check({.name = "positions",
         .q_len = {100, 90},
         .kv_len = {4000, 3000},
         .topk = 16,
         .local = 2,
         .q_offset = {1000, 3500}});
  check({.name = "1 over 20000", .q_len = {1}, .kv_len = {20000}, .paged = true});
  check({.name = "4 tokens ragged",
         .q_len = {4, 3, 0, 1, 4},
         .kv_len = {20000, 3, 100, 0, 9999},
         .paged = true,
         .padding = 4});
  check({.name = "decode nans",
         .q_len = {1, 2, 16},
         .kv_len = {3000, 131, 9000},
         .paged = true,
         .nans = true});
  check({.name = "decode packed, larger limits",
         .q_len = many(40, 1),
         .kv_len = many(40, 2300),
         .more_kv = 100000});
  check({.name = "decode Hi 1",
         .q_len = {16, 8},
         .kv_len = {5000, 4000},
         .heads = 1,
         .topk = 5,
         .init = 1,
         .local = 2,
         .paged = true});
  check({.name = "decode normal",
         .q_len = many(9, 2),
         .kv_len = many(9, 16384),
         .paged = true,
         .integers = false});
  check({.name = "decode bad pages",
         .q_len = {1, 1},
         .kv_len = {5000, 7777},
         .paged = true,
         .bad_pages = true});
  for (int kind = 0; kind < 6; ++kind) {
    check_select(4, 40, 1000, 16, 0, 1, kind, false);
    check_select(2, 700, 300, 16, 2, 1, kind, false);
    check_select(4, 500, 2500, 32, 3, 4, kind, true);
    check_select(1, 100, 8192, 16, 0, 1, kind, false);
    check_select(3, 333, 20, 5, 2, 3, kind, false);
  }
  check_select(1, 2000, 5000, 16, 0, 0, 1, false);
  std::printf("%d wrong\n", failures);
}

/// The scores alone and their merge alone, for several numbers of splits.
void time_splits(const Case& c, std::initializer_list<int> parts) {
  Instance x(c);
  const Problem& p = x.plan.problem;
  Buffer<int> ids(x.tokens * c.heads * c.topk);
  for (int n : parts) {
    ScoreArguments args{};
    require(score_arguments(p, x.q_view(), x.k_view(), x.batch, WideTile::kWarpgroupRows,
                            WideTile::kRows, &args));
    Buffer<Entry> lists(int64_t{args.grid.tiles} * WideTile::kRows * n * kList);
    args.grid.splits = n;
    args.out.ids = ids.data, args.out.ids_head_stride = x.tokens * c.topk,
    args.out.ids_token_stride = c.topk;
    if (n > 1) args.out.lists = lists.data;
    const int inner = c.q_len[0] <= 1024 ? 10 : 2;
    const Timing scores = graph_us(7, inner, [&](int, cudaStream_t stream) {
      require((launch_scores<WideTile, OneTile<WideTile::kRows>, BestBlocks<WideTile>>(
          static_cast<uint32_t>(args.grid.tiles * n), args, stream)));
    });
    Timing merge{};
    if (n > 1)
      merge = graph_us(7, inner, [&](int, cudaStream_t stream) {
        require(launch_selection<8>(
            BatchLists{.batch = args.grid.batch,
                       .selection = args.grid.selection,
                       .lists = lists.data,
                       .heads = p.heads_kv,
                       .splits = n,
                       .rows = WideTile::kRows},
            chosen(p, TensorView::contiguous(ids.data, DType::kI32, {c.heads, x.tokens, c.topk}),
                   {}),
            stream));
      });
    std::printf("%-24s splits %2d  scores %9.1f us (%.1f-%.1f)  %6.1f TFLOP/s  merge %7.1f us\n",
                c.name.c_str(), n, scores.median, scores.low, scores.high,
                2.0 * c.heads * 128 * visible_pairs(c) / scores.median * 1e-6, merge.median);
  }
}

Case prefill(int q, int n) {
  return {.name = std::to_string(q) + " over " + std::to_string(n),
          .q_len = {q},
          .kv_len = {n},
          .integers = false};
}
Case decode(int b, int n, int q = 1) {
  return {
      .name = "decode " + std::to_string(b) + " x " + std::to_string(n) + " q " + std::to_string(q),
      .q_len = many(b, q),
      .kv_len = many(b, n),
      .paged = true,
      .integers = false};
}

void time_variants() {
  const Case n128 = prefill(131072, 131072);
  for (int i = 0; i < 2; ++i) {
    time_variant<WideTile, BestBlocks<WideTile>>("with lists", n128, 20);
    time_variant<WideTile, MaxSink<WideTile>>("no lists", n128, 20);
  }
}

void time_decode() {
  time_index(decode(1, 32768), 32, 20);
  time_index(decode(1, 131072), 16, 20);
  time_index(decode(1, 524288), 4, 20);
  time_index(decode(1, 1048576), 2, 20);
  time_index(decode(8, 131072), 2, 20);
  time_index(decode(32, 32768), 2, 20);
  time_index(decode(32, 131072), 2, 20);
  time_index(decode(4, 1048576), 2, 20);
  time_index(decode(8, 131072, 4), 2, 20);
  time_index(decode(8, 131072, 16), 2, 20);
}

void time_all() {
  time_select(1024, 10);
  time_select(8192, 5);
  time_index(prefill(8192, 8192), 1, 20);
  time_index(prefill(32768, 32768), 1, 20);
  time_index(prefill(131072, 131072), 1, 5);
  time_index(prefill(128, 131072), 8, 20);
  time_index(prefill(1024, 524288), 2, 10);
  time_index(prefill(1024, 1048576), 1, 10);
  time_index(prefill(16384, 1048576), 1, 5);
  time_splits(prefill(128, 131072), {16, 33, 64});
  time_splits(prefill(1024, 524288), {4, 8, 16, 33});
  time_splits(prefill(8192, 8192), {1, 2, 3, 4});
  time_splits(prefill(32768, 32768), {1, 2});
  time_splits(prefill(16384, 1048576), {1, 2, 5});
}

}  // namespace
}  // namespace msa::cuda::sm90::index

int main(int argc, char** argv) {
  setvbuf(stdout, nullptr, _IONBF, 0);
  const std::string what = argc > 1 ? argv[1] : "check";
  using namespace msa::cuda::sm90::index;
  if (what == "check") check_all();
  if (what == "time") time_all();
  if (what == "decode") time_decode();
  if (what == "variants") time_variants();
  return failures == 0 ? 0 : 1;
}
