// The ground the tuned kernels stand on: TMA boxes, swizzled tiles, both wgmma operand layouts,
// operands from registers, and the ring, against plain arithmetic on the host.
#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/launch.h"
#include "cuda/ptx/copy.cuh"
#include "cuda/ptx/grid.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/tensor_map.h"
#include "cuda/tile/ring.cuh"
#include "cuda/tile/shared_tile.cuh"

namespace msa::cuda {
namespace {

constexpr int kRows = 64, kKeys = 128, kDim = 128;

struct Shared {
  SharedTile<kRows, kDim> q;
  SharedTile<kKeys, kDim> k, v;
  RingBarriers<1> ring;
};

/// Which box of each tensor the kernel loads.
struct Boxes {
  int q_head, q_token;
  int token, head, page;
};

/// s = q k^T [64,128], o = bf16(s) v [64,128]; q is [4 tokens, 16 heads, 128] seen as 64 rows.
__global__ void __launch_bounds__(256, 1)
    multiply(const __grid_constant__ CUtensorMap q_map, const __grid_constant__ CUtensorMap k_map,
             const __grid_constant__ CUtensorMap v_map, Boxes boxes, float* s_out, float* o_out) {
  auto& shared = *reinterpret_cast<Shared*>(ptx::dynamic_shared);
  if (threadIdx.x == 0) {
    shared.ring.init(128);
    ptx::fence_barrier_init();
  }
  __syncthreads();
  RingPosition<1> position;
  if (threadIdx.x < 128) {
    ptx::give_registers<24>();
    if (threadIdx.x == 0) {
      position.wait_empty(shared.ring);
      ptx::Barrier* full = &shared.ring.full[0];
      ptx::arrive_expect(full, shared.q.kBytes + shared.k.kBytes + shared.v.kBytes);
      for (int p = 0; p < 2; ++p) {
        const int column = p * kPanelColumns;
        ptx::load_box(shared.q.panel(p), &q_map, full, column, boxes.q_head, boxes.q_token, 0);
        ptx::load_box(shared.k.panel(p), &k_map, full, column, boxes.token, boxes.head, boxes.page);
        ptx::load_box(shared.v.panel(p), &v_map, full, column, boxes.token, boxes.head, boxes.page);
      }
    }
    return;
  }
  ptx::take_registers<232>();
  position.wait_full(shared.ring);
  float s[64], o[64];
  ptx::wgmma_fence();
  for (int i = 0; i < kDim / 16; ++i)
    ptx::wgmma(s, shared.q.k_major(0, i), shared.k.k_major(0, i), i > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  uint32_t p[kKeys / 16][4];
  for (int i = 0; i < kKeys / 16; ++i) {
    for (int j = 0; j < 4; ++j) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
      p[i][j] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
  ptx::wgmma_fence();
  for (int i = 0; i < kKeys / 16; ++i)
    ptx::wgmma<ptx::BLayout::kNMajor>(o, p[i], shared.v.n_major(i), i > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  const int t = static_cast<int>(threadIdx.x) - 128, lane = t % 32;
  for (int j = 0; j < 16; ++j) {
    for (int h = 0; h < 2; ++h) {
      for (int e = 0; e < 2; ++e) {
        const int row = t / 32 * 16 + lane / 4 + 8 * h, column = 8 * j + 2 * (lane % 4) + e;
        s_out[row * kKeys + column] = s[4 * j + 2 * h + e];
        o_out[row * kDim + column] = o[4 * j + 2 * h + e];
      }
    }
  }
}

/// bf16 tensor with random elements, on both sides.
struct Tensor {
  std::vector<float> host;
  TensorView view;

  explicit Tensor(std::initializer_list<int64_t> shape, uint32_t seed) {
    view = TensorView::contiguous(nullptr, DType::kBF16, shape);
    std::mt19937 engine(seed);
    std::normal_distribution<float> normal;
    std::vector<__nv_bfloat16> bits(static_cast<size_t>(view.numel()));
    for (auto& x : bits) x = __float2bfloat16(normal(engine)), host.push_back(__bfloat162float(x));
    EXPECT_EQ(cudaMalloc(&view.data, bits.size() * 2), cudaSuccess);
    cudaMemcpy(view.data, bits.data(), bits.size() * 2, cudaMemcpyHostToDevice);
  }
  ~Tensor() { cudaFree(view.data); }
  float at(int64_t a, int64_t b, int64_t c, int64_t d = 0) const {
    return host[static_cast<size_t>(view.offset(a, b, c, d))];
  }
};

bool has_hopper() {
  cudaDeviceProp properties{};
  return cudaGetDeviceProperties(&properties, 0) == cudaSuccess && properties.major == 9;
}

void expect_products(KvLayout layout, Boxes boxes) {
  if (!has_hopper()) GTEST_SKIP() << "skipped: no device";
  const bool paged = layout == KvLayout::kPaged;
  const Tensor q({9, 32, kDim}, 1);
  const auto keys = [&](uint32_t seed) {
    return paged ? Tensor({5, 3, kKeys, kDim}, seed) : Tensor({300, 3, kDim}, seed);
  };
  const Tensor k = keys(2), v = keys(3);
  CUtensorMap q_map, k_map, v_map;
  ASSERT_TRUE(map_queries("q", q.view, 16, 4, &q_map).ok());
  ASSERT_TRUE(map_keys("k", k.view, layout, kKeys, &k_map).ok());
  ASSERT_TRUE(map_keys("v", v.view, layout, kKeys, &v_map).ok());
  float* out = nullptr;
  ASSERT_EQ(cudaMalloc(&out, 2 * kRows * kKeys * 4), cudaSuccess);
  ASSERT_TRUE(launch("multiply", multiply,
                     {.grid = 1, .block = 256, .shared_bytes = sizeof(Shared)}, nullptr, q_map,
                     k_map, v_map, boxes, out, out + kRows * kKeys)
                  .ok());
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  std::vector<float> got(2 * kRows * kKeys);
  cudaMemcpy(got.data(), out, got.size() * 4, cudaMemcpyDeviceToHost);
  cudaFree(out);

  const auto key = [&](const Tensor& t, int j, int d) -> float {
    if (paged) return t.at(boxes.page, boxes.head, boxes.token + j, d);
    return boxes.token + j < 300 ? t.at(boxes.token + j, boxes.head, d) : 0.F;
  };
  for (int row = 0; row < kRows; ++row) {
    std::vector<float> s(kKeys);
    for (int j = 0; j < kKeys; ++j) {
      for (int d = 0; d < kDim; ++d)
        s[j] += q.at(boxes.q_token + row / 16, boxes.q_head + row % 16, d) * key(k, j, d);
      ASSERT_NEAR(got[row * kKeys + j], s[j], 1e-3) << "s, row " << row << " key " << j;
    }
    for (int d = 0; d < kDim; ++d) {
      float o = 0;
      for (int j = 0; j < kKeys; ++j)
        o += __bfloat162float(__float2bfloat16(got[row * kKeys + j])) * key(v, j, d);
      ASSERT_NEAR(got[(kRows + row) * kKeys + d], o, 2e-2) << "o, row " << row << " column " << d;
    }
  }
}

TEST(Tiles, MultiplyPackedKeys) {
  expect_products(KvLayout::kPacked,
                  {.q_head = 16, .q_token = 3, .token = 77, .head = 2, .page = 0});
}
TEST(Tiles, RowsBehindTheTensorAreZero) {
  expect_products(KvLayout::kPacked,
                  {.q_head = 0, .q_token = 5, .token = 250, .head = 0, .page = 0});
}
TEST(Tiles, MultiplyPagedKeys) {
  expect_products(KvLayout::kPaged, {.q_head = 16, .q_token = 0, .token = 0, .head = 1, .page = 4});
}
TEST(Tiles, RefusesOddStrides) {
  TensorView view = TensorView::contiguous(nullptr, DType::kBF16, {10, 2, 128});
  view.stride[0] = 260;
  CUtensorMap map;
  const Status status = map_keys("k", view, KvLayout::kPacked, kKeys, &map);
  if (status.code() == StatusCode::kUnavailable) GTEST_SKIP() << "skipped: no driver";
  EXPECT_NE(status.message().find("k: got a stride of 260 elements"), std::string::npos)
      << status.message();
}

}  // namespace
}  // namespace msa::cuda
