// What a caller of the CUDA backends may rely on beside right numbers: nothing is allocated and
// nothing waited for, a captured call can be replayed with other lengths, what lies outside the
// visible tokens is never used, and bad metadata harms nobody.
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <deque>
#include <numeric>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "conformance/device.h"
#include "conformance/judge.h"
#include "conformance/tensors.h"
#include "core/half.h"
#include "core/op_table.h"
#include "msa/msa.h"

namespace msa {
namespace {

using conformance::DeviceMemory;
using conformance::Params;

constexpr Device kDevice{DeviceKind::kCUDA, 0};
constexpr int kBlock = 128, kDim = 128;

/// Tensors on the device, with memory of their own each.
class Arena {
 public:
  TensorView make(DType dtype, std::initializer_list<int64_t> shape) {
    TensorView view = TensorView::contiguous(nullptr, dtype, shape);
    view.device = kDevice;
    const auto bytes = static_cast<size_t>(view.numel() * size_of(dtype));
    const Status status =
        DeviceMemory::allocate(std::max<size_t>(bytes, 1), &memory_.emplace_back());
    EXPECT_TRUE(status.ok()) << status.message();
    view.data = memory_.back().data();
    return view;
  }
  TensorView i32(std::initializer_list<int64_t> shape, const std::vector<int32_t>& values) {
    const TensorView view = make(DType::kI32, shape);
    write(view, values);
    return view;
  }
  /// Normally distributed bf16: a window, chosen by `seed`, of one long random sequence.
  TensorView random(std::initializer_list<int64_t> shape, size_t seed) {
    static const DeviceMemory source = random_source();
    const TensorView view = make(DType::kBF16, shape);
    const auto count = static_cast<size_t>(view.numel());
    size_t from = seed * 1000003 % kRandom;
    for (size_t done = 0; done < count; from = 0) {
      const size_t n = std::min(count - done, kRandom - from);
      cudaMemcpy(view.at<uint16_t>() + done, static_cast<uint16_t*>(source.data()) + from, n * 2,
                 cudaMemcpyDeviceToDevice);
      done += n;
    }
    return view;
  }
  template <class T>
  static void write(const TensorView& view, const std::vector<T>& values) {
    const Status status = conformance::upload(view.data, values.data(), values.size() * sizeof(T));
    EXPECT_TRUE(status.ok()) << status.message();
  }

 private:
  static constexpr size_t kRandom = 16'000'057;

  static DeviceMemory random_source() {
    std::mt19937 engine(1);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(kRandom);
    for (uint16_t& x : values) x = f32_to_bf16(normal(engine));
    DeviceMemory memory;
    EXPECT_TRUE(DeviceMemory::allocate(kRandom * 2, &memory).ok());
    EXPECT_TRUE(conformance::upload(memory.data(), values.data(), kRandom * 2).ok());
    return memory;
  }

  std::deque<DeviceMemory> memory_;
};

/// 0, then the sum of the first one, two, ... lengths.
std::vector<int32_t> prefix_sums(const std::vector<int32_t>& lengths) {
  std::vector<int32_t> sums{0};
  for (int32_t n : lengths) sums.push_back(sums.back() + n);
  return sums;
}

/// A batch over a paged cache of the shape of MiniMax-M3 or one of its tensor-parallel shards.
struct Scene {
  int heads_q = 64, heads_kv = 4, topk = 16;
  std::vector<int32_t> q_lens, kv_lens;
  int max_pages = 40;
  KvLayout layout = KvLayout::kPaged;

  Arena arena{};
  TensorView q{}, q_idx{}, k{}, v{}, k_idx{};
  Batch batch{};
  int64_t tokens = 0;

  Scene(int hq, int hkv, std::vector<int32_t> ql, std::vector<int32_t> kl)
      : heads_q(hq), heads_kv(hkv), q_lens(std::move(ql)), kv_lens(std::move(kl)) {
    const auto sequences = static_cast<int64_t>(q_lens.size());
    tokens = std::accumulate(q_lens.begin(), q_lens.end(), int64_t{2});  // two rows of padding
    const int64_t pages = sequences * max_pages;
    q = arena.random({tokens, heads_q, kDim}, 1);
    q_idx = arena.random({tokens, heads_kv, kDim}, 2);
    k = arena.random({pages, heads_kv, kBlock, kDim}, 3);
    v = arena.random({pages, heads_kv, kBlock, kDim}, 4);
    k_idx = arena.random({pages, kBlock, kDim}, 5);
    std::vector<int32_t> table(static_cast<size_t>(pages));
    std::iota(table.begin(), table.end(), 0);
    std::shuffle(table.begin(), table.end(), std::mt19937(6));
    batch.cu_seqlens_q = arena.i32({sequences + 1}, prefix_sums(q_lens));
    batch.seq_lens = arena.i32({sequences}, kv_lens);
    batch.page_table = arena.i32({sequences, max_pages}, table);
  }

  /// The same lengths over packed keys.
  void pack() {
    layout = KvLayout::kPacked;
    const std::vector<int32_t> cu_k = prefix_sums(kv_lens);
    const int64_t keys = cu_k.back();
    k = arena.random({keys, heads_kv, kDim}, 3);
    v = arena.random({keys, heads_kv, kDim}, 4);
    k_idx = arena.random({keys, kDim}, 5);
    batch.seq_lens = batch.page_table = {};
    batch.cu_seqlens_k = arena.i32({static_cast<int64_t>(cu_k.size())}, cu_k);
  }

  Problem problem(Op op) const {
    return {.op = op,
            .dtype = DType::kBF16,
            .layout = layout,
            .heads_q = heads_q,
            .heads_kv = heads_kv,
            .head_dim = kDim,
            .index_dim = kDim,
            .block_size = kBlock,
            .topk = topk,
            .device = kDevice};
  }
  Limits limits() const {
    return {.max_batch = static_cast<int64_t>(q_lens.size()),
            .max_tokens = tokens,
            .max_seqlen_q = *std::max_element(q_lens.begin(), q_lens.end()),
            .max_seqlen_k = int64_t{max_pages} * kBlock};
  }

  /// Lists of distinct blocks in no order, some of them beyond what their query sees.
  TensorView make_ids() {
    std::mt19937 engine(7);
    std::vector<int32_t> blocks(static_cast<size_t>(max_pages));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::vector<int32_t> ids;
    for (int64_t list = 0; list < heads_kv * tokens; ++list) {
      std::shuffle(blocks.begin(), blocks.end(), engine);
      ids.insert(ids.end(), blocks.begin(), blocks.begin() + topk);
    }
    return arena.i32({heads_kv, tokens, topk}, ids);
  }

  /// The arguments of an operator, with outputs of their own.
  Params arguments(Op op) {
    const auto f32 = [&](std::initializer_list<int64_t> shape) {
      return arena.make(DType::kF32, shape);
    };
    const TensorView o = arena.make(DType::kBF16, {tokens, heads_q, kDim});
    switch (op) {
      case Op::kIndexScores:
        return IndexScoresParams{.q_idx = q_idx,
                                 .k_idx = k_idx,
                                 .batch = batch,
                                 .scores = f32({heads_kv, tokens, max_pages})};
      case Op::kSelectBlocks: {
        TensorView scores = f32({heads_kv, tokens, max_pages});
        std::vector<float> values(static_cast<size_t>(scores.numel()));
        std::mt19937 engine(8);
        for (float& x : values) x = static_cast<float>(engine() % 1000);
        Arena::write(scores, values);
        return SelectBlocksParams{.scores = scores,
                                  .block_ids = arena.make(DType::kI32, {heads_kv, tokens, topk})};
      }
      case Op::kIndexSelect:
        return IndexSelectParams{.q_idx = q_idx,
                                 .k_idx = k_idx,
                                 .batch = batch,
                                 .block_ids = arena.make(DType::kI32, {heads_kv, tokens, topk}),
                                 .scores = f32({heads_kv, tokens, topk})};
      case Op::kSparseAttention:
        return SparseAttentionParams{.q = q,
                                     .k = k,
                                     .v = v,
                                     .block_ids = make_ids(),
                                     .batch = batch,
                                     .o = o,
                                     .lse = f32({tokens, heads_q})};
      case Op::kDenseAttention:
        return DenseAttentionParams{
            .q = q, .k = k, .v = v, .batch = batch, .o = o, .lse = f32({tokens, heads_q})};
      case Op::kMerge: {
        const TensorView lse = f32({3, tokens, heads_q});
        std::vector<float> values(static_cast<size_t>(lse.numel()));
        std::mt19937 engine(9);
        for (float& x : values) x = static_cast<float>(engine() % 7);
        Arena::write(lse, values);
        return MergeParams{.o_parts = arena.random({3, tokens, heads_q, kDim}, 10),
                           .lse_parts = lse,
                           .o = o,
                           .lse = f32({tokens, heads_q})};
      }
      case Op::kMergeLists: {
        const TensorView scores = f32({3, heads_kv, tokens, topk});
        std::vector<float> values(static_cast<size_t>(scores.numel()));
        std::vector<int32_t> ids(values.size());
        std::mt19937 engine(16);
        for (float& x : values) x = static_cast<float>(engine() % 7);
        for (size_t i = 0; i < ids.size(); ++i)
          ids[i] = static_cast<int32_t>(i % static_cast<size_t>(topk) * 3 + i / (ids.size() / 3));
        const TensorView lists = arena.make(DType::kI32, {3, heads_kv, tokens, topk});
        Arena::write(scores, values);
        Arena::write(lists, ids);
        return MergeListsParams{.scores_parts = scores,
                                .block_ids_parts = lists,
                                .block_ids = arena.make(DType::kI32, {heads_kv, tokens, topk}),
                                .scores = f32({heads_kv, tokens, topk})};
      }
      case Op::kBlockLists: {
        Batch lengths = batch;
        lengths.page_table = {};
        const int64_t rows = static_cast<int64_t>(q_lens.size()) * max_pages;
        return BlockListsParams{.block_ids = make_ids(),
                                .batch = lengths,
                                .row_ptr = arena.make(DType::kI32, {heads_kv, rows + 1}),
                                .entries = arena.make(DType::kI32, {heads_kv, tokens * topk})};
      }
      case Op::kAppendPaged: {
        const int64_t pages = k.shape[0];
        return AppendPagedParams{
            .k = arena.random({tokens, heads_kv, kDim}, 11),
            .v = arena.random({tokens, heads_kv, kDim}, 12),
            .k_idx = arena.random({tokens, kDim}, 13),
            .batch = batch,
            .k_pages = arena.make(DType::kBF16, {pages, heads_kv, kBlock, kDim}),
            .v_pages = arena.make(DType::kBF16, {pages, heads_kv, kBlock, kDim}),
            .k_idx_pages = arena.make(DType::kBF16, {pages, kBlock, kDim})};
      }
      case Op::kBlockMass:
        return BlockMassParams{.q = q,
                               .k = k,
                               .lse = make_lse(heads_q),
                               .batch = batch,
                               .mass = f32({heads_kv, tokens, max_pages})};
      case Op::kLayer:
        return LayerParams{.q = q,
                           .q_idx = q_idx,
                           .k = k,
                           .v = v,
                           .k_idx = k_idx,
                           .batch = batch,
                           .o = o,
                           .lse = f32({tokens, heads_q}),
                           .block_ids = arena.make(DType::kI32, {heads_kv, tokens, topk})};
      case Op::kSparseAttentionBackward:
      case Op::kDenseAttentionBackward:
        return AttentionBackwardParams{
            .q = q,
            .k = k,
            .v = v,
            .block_ids = op == Op::kSparseAttentionBackward ? make_ids() : TensorView{},
            .o = arena.random({tokens, heads_q, kDim}, 14),
            .lse = make_lse(heads_q),
            .d_o = arena.random({tokens, heads_q, kDim}, 15),
            .batch = batch,
            .dq = o,
            .dk = arena.make(DType::kBF16, {k.shape[0], heads_kv, kDim}),
            .dv = f32({k.shape[0], heads_kv, kDim})};
      case Op::kIndexLse:
        return IndexLseParams{.q_idx = q_idx,
                              .k_idx = k_idx,
                              .block_ids = make_ids(),
                              .batch = batch,
                              .lse = f32({tokens, heads_kv})};
      case Op::kKlBackward:
      case Op::kKlLoss: {
        KlParams a{.q = q,
                   .k = k,
                   .lse = make_lse(heads_q),
                   .q_idx = q_idx,
                   .k_idx = k_idx,
                   .index_lse = make_lse(heads_kv),
                   .block_ids = make_ids(),
                   .batch = batch,
                   .kl = f32({tokens, heads_kv})};
        if (op == Op::kKlLoss) return a;
        a.dq_idx = f32({tokens, heads_kv, kDim});
        a.dk_idx = arena.make(DType::kBF16, {k.shape[0], kDim});
        return a;
      }
    }
    return {};
  }

  /// Of logits that are normally distributed, about.
  TensorView make_lse(int heads) {
    const TensorView lse = arena.make(DType::kF32, {tokens, heads});
    Arena::write(lse, std::vector<float>(static_cast<size_t>(lse.numel()), 5.0f));
    return lse;
  }
};

/// A plan, its workspace, and the arguments of one operator.
class Bound {
 public:
  Bound(const std::string& backend, const Problem& problem, const Limits& limits, Params params)
      : params_(std::move(params)) {
    const Status status = plan(problem, limits, &plan_, backend);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_TRUE(DeviceMemory::allocate(std::max<size_t>(bytes(), 1), &workspace_).ok());
  }
  Params& params() { return params_; }

  Status run(cudaStream_t stream) const {
    const Workspace workspace{bytes() == 0 ? nullptr : workspace_.data(), bytes()};
    return std::visit(
        [&](const auto& a) { return msa::run(plan_, a, workspace, {.cuda_stream = stream}); },
        params_);
  }
  /// Every output and the workspace hold `pattern`.
  void poison(int pattern) {
    if (bytes() > 0) cudaMemset(workspace_.data(), pattern, bytes());
    for (const conformance::Output& output : conformance::outputs(params_))
      cudaMemset(output.view->data, pattern, output_bytes(*output.view));
  }
  /// The elements of all outputs, when everything enqueued is done.
  std::vector<std::byte> results() {
    std::vector<std::byte> all;
    for (const conformance::Output& output : conformance::outputs(params_)) {
      const size_t begin = all.size(), size = output_bytes(*output.view);
      all.resize(begin + size);
      const Status status = conformance::download(all.data() + begin, output.view->data, size);
      EXPECT_TRUE(status.ok()) << status.message();
    }
    return all;
  }
  std::vector<std::byte> run_and_take(int pattern = 0xff) {
    poison(pattern);
    const Status status = run(nullptr);
    EXPECT_TRUE(status.ok()) << status.message();
    return results();
  }

 private:
  size_t bytes() const { return static_cast<size_t>(plan_.workspace_bytes); }
  static size_t output_bytes(const TensorView& view) {  // contiguous ones
    return static_cast<size_t>(view.numel() * size_of(view.dtype));
  }

  Params params_;
  Plan plan_{};
  DeviceMemory workspace_;
};

/// An operator, in a decoding step or not.
struct Called {
  Op op;
  bool step;
};
std::vector<Called> calls() {
  std::vector<Called> all = {{Op::kSparseAttention, true}, {Op::kLayer, true}};
  for (const OpInfo& info : all_ops()) all.push_back({info.op, false});
  return all;
}
constexpr Called kPagedReaders[] = {{Op::kIndexScores, false},
                                    {Op::kIndexSelect, false},
                                    {Op::kSparseAttention, false},
                                    {Op::kSparseAttention, true},
                                    {Op::kDenseAttention, false},
                                    {Op::kBlockMass, false},
                                    {Op::kLayer, true}};

Scene decode_scene(int hq = 64, int hkv = 4) {
  return Scene(hq, hkv, {1, 4, 1, 16, 2}, {5000, 129, 0, 1024, 2});
}
Scene prefill_scene(int hq = 64, int hkv = 4) {
  return Scene(hq, hkv, {300, 0, 129, 7}, {3000, 200, 129, 4000});
}

constexpr const char* kBackends[] = {"cuda", "cuda-plain", "cuda-kv-outer"};

class Contracts : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    const Status usable = find_backend(GetParam())->usable();
    if (!usable.ok()) GTEST_SKIP() << "skipped: " << usable.message();
    ASSERT_EQ(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), cudaSuccess);
  }
  void TearDown() override {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
    if (IsSkipped()) return;
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }
  /// Kernels that backends share are tested in the first that has them.
  static bool concerns(Op op) {
    const auto best = [&](const char* backend) {
      return std::ranges::find(find_backend(backend)->kernels, op, &Kernel::op)->run;
    };
    for (const char* backend : kBackends) {
      if (std::string_view(backend) == GetParam()) return true;
      if (best(backend) == best(GetParam())) return false;
    }
    return false;
  }
  /// Training takes packed keys only, so it packs the scene.
  Bound bind(Scene& scene, Op op) {
    if (is_training(op)) scene.pack();
    return Bound(GetParam(), scene.problem(op), scene.limits(), scene.arguments(op));
  }
  /// The call as a graph; null (and a failure) if it cannot be captured. Allocations and waits
  /// are illegal while this thread captures.
  cudaGraphExec_t capture(const Bound& bound) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal), cudaSuccess);
    const Status status = bound.run(stream_);
    EXPECT_TRUE(status.ok()) << status.message();
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    if (graph != nullptr) {
      EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
      cudaGraphDestroy(graph);
    }
    return exec;
  }

  cudaStream_t stream_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Cuda, Contracts, testing::ValuesIn(kBackends), [](const auto& info) {
  std::string name = info.param;
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
});

TEST_P(Contracts, ReplayWithOtherLengths) {
  for (bool decode : {true, false}) {
    for (const OpInfo& info : all_ops()) {
      const Op op = info.op;
      if (!concerns(op)) continue;
      SCOPED_TRACE(name_of(op));
      Scene scene = decode ? decode_scene() : prefill_scene();
      Bound bound = bind(scene, op);
      const std::vector<std::byte> before = bound.run_and_take();
      cudaGraphExec_t graph = capture(bound);
      ASSERT_NE(graph, nullptr);

      std::vector<int32_t> other = scene.kv_lens;
      if (is_training(op)) {  // not beyond the tensors, which have no room
        for (int32_t& length : other) length -= length > 700 ? 333 : 0;
        Arena::write(scene.batch.cu_seqlens_k, prefix_sums(other));
      } else {
        for (int32_t& length : other) length = length > 700 ? length - 333 : length + 411;
        Arena::write(scene.batch.seq_lens, other);
      }
      bound.poison(0x5a);
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
      ASSERT_EQ(cudaGraphLaunch(graph, stream_), cudaSuccess);
      ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
      const std::vector<std::byte> replayed = bound.results();
      const bool by_length = op != Op::kSelectBlocks && op != Op::kMerge && op != Op::kMergeLists;
      const int pattern = op == Op::kAppendPaged ? 0x5a : 0xff;  // pages keep what was there
      EXPECT_EQ(replayed == bound.run_and_take(pattern), true) << "replay differs from a call";
      EXPECT_EQ(replayed != before, by_length) << "do the lengths matter?";
      cudaGraphExecDestroy(graph);
    }
  }
}

TEST_P(Contracts, NothingIsAllocated) {
  for (const auto& [op, step] : calls()) {
    if (!concerns(op)) continue;
    SCOPED_TRACE(name_of(op));
    Scene scene = decode_scene();
    Bound bound = bind(scene, op);
    bound.run_and_take();  // loads the kernels
    size_t before = 0, after = 0, total = 0;
    ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(bound.run(stream_).ok());
    ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
    EXPECT_EQ(before, after);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
  }
}

TEST_P(Contracts, ThreeRunsGiveTheSameBits) {
  for (auto [hq, hkv] : {std::pair{64, 4}, {16, 1}, {8, 1}, {16, 2}}) {
    for (const auto& [op, step] : calls()) {
      if (!concerns(op)) continue;
      SCOPED_TRACE(name_of(op));
      Scene scene = step ? decode_scene(hq, hkv) : prefill_scene(hq, hkv);
      Bound bound = bind(scene, op);
      const std::vector<std::byte> first = bound.run_and_take(0xff);
      EXPECT_TRUE(first == bound.run_and_take(0xff));
      if (op == Op::kAppendPaged) continue;  // pages keep what was there
      EXPECT_TRUE(first == bound.run_and_take(0x00));
    }
  }
}

TEST_P(Contracts, StaleTokensAreNeverUsed) {
  for (const auto& [op, step] : kPagedReaders) {
    if (!concerns(op)) continue;
    SCOPED_TRACE(name_of(op));
    Scene scene = step ? decode_scene() : prefill_scene();
    Bound bound = bind(scene, op);
    const std::vector<std::byte> clean = bound.run_and_take();
    // NaN in every page that no sequence uses and behind every sequence's end.
    std::vector<int32_t> table(static_cast<size_t>(scene.batch.page_table.numel()));
    ASSERT_TRUE(
        conformance::download(table.data(), scene.batch.page_table.data, table.size() * 4).ok());
    for (const TensorView* pool : {&scene.k, &scene.v, &scene.k_idx}) {
      const bool heads = pool->rank == 4;
      for (size_t b = 0; b < scene.kv_lens.size(); ++b) {
        for (int j = 0; j < scene.max_pages; ++j) {
          const int32_t page =
              table[b * static_cast<size_t>(scene.max_pages) + static_cast<size_t>(j)];
          const int64_t used = std::clamp(scene.kv_lens[b] - j * kBlock, 0, kBlock);
          for (int64_t h = 0; h < (heads ? scene.heads_kv : 1); ++h) {
            const int64_t begin = heads ? pool->offset(page, h, used) : pool->offset(page, used);
            cudaMemset(pool->at<uint16_t>() + begin, 0xff,
                       static_cast<size_t>((kBlock - used) * kDim * 2));
          }
        }
      }
    }
    EXPECT_TRUE(clean == bound.run_and_take());
  }
}

TEST_P(Contracts, PoolsBeyondTwoToThe31Elements) {
  for (const auto& [op, step] : kPagedReaders) {
    if (!concerns(op)) continue;
    SCOPED_TRACE(name_of(op));
    Scene scene = step ? decode_scene() : prefill_scene();
    const std::vector<std::byte> small = bind(scene, op).run_and_take();
    // The same pages at the far end of a pool of 2^31 elements and more.
    std::vector<int32_t> table(static_cast<size_t>(scene.batch.page_table.numel()));
    ASSERT_TRUE(
        conformance::download(table.data(), scene.batch.page_table.data, table.size() * 4).ok());
    Arena far;
    const bool index = op == Op::kIndexScores || op == Op::kIndexSelect || op == Op::kLayer;
    const bool rows = op != Op::kIndexScores && op != Op::kIndexSelect;
    const int64_t page_elements = (rows ? scene.heads_kv : 1) * kBlock * kDim;
    const int64_t first = (int64_t{1} << 31) / page_elements + 1;
    const auto move = [&](TensorView* pool) {
      const int64_t pages = pool->shape[0], page = pool->stride[0];
      TensorView moved = pool->rank == 4
                             ? far.make(DType::kBF16, {first + pages, scene.heads_kv, kBlock, kDim})
                             : far.make(DType::kBF16, {first + pages, kBlock, kDim});
      ASSERT_EQ(cudaMemcpy(moved.at<uint16_t>(first), pool->data,
                           static_cast<size_t>(pages * page * 2), cudaMemcpyDeviceToDevice),
                cudaSuccess);
      *pool = moved;
    };
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    if (free < size_t{14} << 30) GTEST_SKIP() << "skipped: less than 14 GiB of device memory free";
    if (index) move(&scene.k_idx);
    if (rows) move(&scene.k), move(&scene.v);
    for (int32_t& page : table) page += static_cast<int32_t>(first);
    Arena::write(scene.batch.page_table, table);
    EXPECT_TRUE(small == bind(scene, op).run_and_take());
  }
}

/// k and v, packed, row by row beside each other in one pool: a token's rows are 2*D apart.
TEST_P(Contracts, StridedPackedPools) {
  constexpr int64_t kKeys = 1500;
  for (Op op : {Op::kSparseAttention, Op::kDenseAttention}) {
    if (!concerns(op)) continue;
    SCOPED_TRACE(name_of(op));
    Scene scene(16, 2, {200}, {kKeys});
    scene.pack();
    const std::vector<std::byte> apart = bind(scene, op).run_and_take();
    TensorView pool = scene.arena.make(DType::kBF16, {kKeys, 2, 2, kDim});
    for (int which = 0; which < 2; ++which) {
      TensorView& view = which == 0 ? scene.k : scene.v;
      uint16_t* to = pool.at<uint16_t>(0, 0, which);
      ASSERT_EQ(cudaMemcpy2D(to, 4 * kDim, view.data, 2 * kDim, 2 * kDim, 2 * kKeys,
                             cudaMemcpyDeviceToDevice),
                cudaSuccess);
      view.data = to;
      view.stride = {4 * kDim, 2 * kDim, 1, 0};
    }
    EXPECT_TRUE(apart == bind(scene, op).run_and_take());
  }
}

/// Nothing on the host can see these; they may give any result, but harm nobody. Run under
/// compute-sanitizer, this test also sees reads outside of the tensors.
TEST_P(Contracts, BadMetadataHarmsNobody) {
  const std::vector<int32_t> bad = {-1,         -77,        1 << 30, 0x7fffffff,
                                    (-1) << 31, 0x7ffffff0, 3,       1000000};
  std::mt19937 engine(31);
  const auto spoil = [&](const TensorView& view) {
    std::vector<int32_t> values(static_cast<size_t>(view.numel()));
    ASSERT_TRUE(conformance::download(values.data(), view.data, values.size() * 4).ok());
    for (int32_t& x : values)
      if (engine() % 3 == 0) x = bad[engine() % bad.size()];
    Arena::write(view, values);
  };
  for (int round = 0; round < 6; ++round) {
    for (const auto& [op, step] : calls()) {
      if (!concerns(op)) continue;
      SCOPED_TRACE(name_of(op));
      Scene scene = step ? decode_scene(16, 2) : prefill_scene(16, 2);
      if (round % 2 == 0 && !step && op != Op::kAppendPaged) scene.pack();
      Bound bound = bind(scene, op);
      for (const TensorView& lengths : {scene.batch.seq_lens, scene.batch.cu_seqlens_k})
        if (round != 1 && lengths.given()) spoil(lengths);
      if (round != 2 && scene.batch.page_table.given()) spoil(scene.batch.page_table);
      if (round >= 3) spoil(scene.batch.cu_seqlens_q);
      if (auto* a = std::get_if<SparseAttentionParams>(&bound.params())) spoil(a->block_ids);
      if (auto* a = std::get_if<BlockListsParams>(&bound.params())) spoil(a->block_ids);
      if (auto* a = std::get_if<IndexLseParams>(&bound.params())) spoil(a->block_ids);
      const auto spoil_lists = [&](auto* a) {  // our own inverse lists in one round, given ones
        if (a == nullptr || !a->block_ids.given()) return;  // in the next
        spoil(a->block_ids);
        if (round % 2 == 0 || op == Op::kKlLoss) return;
        a->row_ptr = scene.arena.i32({scene.heads_kv, 4}, {0, 3, 5, 9, 0, 0, 1000, 1000});
        a->entries = scene.arena.make(DType::kI32, {scene.heads_kv, scene.tokens * scene.topk});
        std::vector<int32_t> entries(static_cast<size_t>(a->entries.numel()));
        std::iota(entries.begin(), entries.end(), 0);
        Arena::write(a->entries, entries);
        spoil(a->row_ptr), spoil(a->entries);
      };
      spoil_lists(std::get_if<AttentionBackwardParams>(&bound.params()));
      spoil_lists(std::get_if<KlParams>(&bound.params()));
      bound.run_and_take();
      ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess) << "round " << round;
    }
  }
}

/// Rows of two backends that round differently: probabilities in bf16 on one side (1e-2 of the row,
/// 1e-3 where values cancel; src/conformance/judge.cc), outputs in bf16 on both.
void expect_equal_rows(const SparseAttentionParams& got, const SparseAttentionParams& want) {
  const auto compare = [](const char* name, TensorView a, TensorView b,
                          const conformance::Tolerance& tolerance) {
    conformance::Verdict verdict;
    std::vector<std::byte> memory[2];
    for (int i = 0; i < 2; ++i) {
      TensorView& view = i == 0 ? a : b;
      memory[i].resize(static_cast<size_t>(view.numel() * size_of(view.dtype)));
      ASSERT_TRUE(conformance::download(memory[i].data(), view.data, memory[i].size()).ok());
      view.data = memory[i].data();
    }
    conformance::compare_rows(name, a, b, tolerance, &verdict);
    EXPECT_TRUE(verdict.ok()) << verdict.failure;
  };
  compare("o", got.o, want.o,
          {.absolute = 1e-3, .row = 1e-2, .element = 2 * 0x1p-8, .cosine = 0.9999});
  compare("lse", got.lse, want.lse, {.absolute = 1e-4});
}

/// Both orders of sparse prefill against the plain kernels; the last scene is long enough for
/// several windows of KV-outer.
TEST(PrefillOrders, AgreeWithThePlainKernels) {
  const Status usable = find_backend("cuda")->usable();
  if (!usable.ok()) GTEST_SKIP() << "skipped: " << usable.message();
  struct Setting {
    int heads_q, heads_kv;
    std::vector<int32_t> q_lens, kv_lens;
    bool packed = false, causal = true, f32 = false;
    int topk = 16;
  };
  const std::vector<Setting> settings{
      {64, 4, {300, 0, 129, 7}, {3000, 200, 129, 4000}},
      {64, 4, {300, 1, 129, 7}, {3000, 2500, 129, 4000}, true},
      {16, 2, {65, 200}, {65, 5000}, false, true, true},
      {16, 1, {1000}, {5120}, true, false},
      {8, 1, std::vector<int32_t>(70, 13), std::vector<int32_t>(70, 900), false, true, true, 5},
      {8, 1, {4500, 700}, {4800, 5000}}};
  for (const Setting& s : settings) {
    Scene scene(s.heads_q, s.heads_kv, s.q_lens, s.kv_lens);
    scene.topk = s.topk;
    if (s.packed) scene.pack();
    scene.batch.causal = s.causal;
    const auto arguments = [&] {
      auto a = std::get<SparseAttentionParams>(scene.arguments(Op::kSparseAttention));
      if (s.f32) a.o = scene.arena.make(DType::kF32, {scene.tokens, s.heads_q, kDim});
      return a;
    };
    const SparseAttentionParams want = arguments();
    const auto run = [&](const char* backend, const SparseAttentionParams& a) {
      return Bound(backend, scene.problem(Op::kSparseAttention), scene.limits(), a).run_and_take();
    };
    run("cuda-plain", want);
    for (const char* order : {"cuda-union", "cuda-kv-outer"}) {
      SCOPED_TRACE(std::string(order) + " " + std::to_string(&s - settings.data()));
      const SparseAttentionParams got = arguments();
      const std::vector<std::byte> first = run(order, got);
      expect_equal_rows(got, want);
      EXPECT_TRUE(first == run(order, got)) << "other bits in a second run";
    }
  }
}

}  // namespace
}  // namespace msa
