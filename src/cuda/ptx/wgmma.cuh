// Warpgroup matrix products: D[64,N] += A[64,16] B[16,N], bf16 in, f32 out, asynchronous.
//
//   wgmma_fence();                  // registers written by ordinary code are ready
//   wgmma(d, a, b, accumulate);     // once per 16 of the inner dimension; N = 2 * registers of d
//   wgmma_commit();
//   wgmma_wait<0>();                // then the registers may be read
//
// Registers of thread t (warp w = t/32 of the warpgroup, lane l): accumulator d[4*j + 2*h + e] is
// row 16*w + l/4 + 8*h, column 8*j + 2*(l%4) + e. An A fragment in registers has the same rows:
// a[2*c + h] holds columns 8*c + 2*(l%4) + {0,1} of its k16 step.
#pragma once

#include <cstdint>

namespace msa::cuda::ptx {

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
/// Until at most kPending committed groups are unfinished.
template <int kPending>
__device__ inline void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
/// Keeps the compiler from moving reads or writes of accumulators across this point.
template <int kCount>
__device__ inline void pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

/// How B lies in shared memory: [N,16] rows of the inner dimension (keys of Q K^T), or [16,N] rows
/// of columns (values of P V).
enum class BLayout { kKMajor = 0, kNMajor = 1 };

/// The same of A: [64,16] rows of the inner dimension, or [16,64] rows of D's rows.
enum class ALayout { kKMajor = 0, kMMajor = 1 };

// Operand lists.
#define MSA_D8(i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define MSA_D32(i) MSA_D8(i), MSA_D8(i + 8), MSA_D8(i + 16), MSA_D8(i + 24)
#define MSA_D64 MSA_D32(0), MSA_D32(32)
#define MSA_D128 MSA_D64, MSA_D32(64), MSA_D32(96)
#define MSA_R8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MSA_R32_0                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, "         \
  "%8, %9, %10, %11, %12, %13, %14, %15, "   \
  "%16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MSA_R32_32                           \
  "%32, %33, %34, %35, %36, %37, %38, %39, " \
  "%40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, " \
  "%56, %57, %58, %59, %60, %61, %62, %63"
#define MSA_R32_64                           \
  "%64, %65, %66, %67, %68, %69, %70, %71, " \
  "%72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, " \
  "%88, %89, %90, %91, %92, %93, %94, %95"
#define MSA_R32_96                                   \
  "%96, %97, %98, %99, %100, %101, %102, %103, "     \
  "%104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, " \
  "%120, %121, %122, %123, %124, %125, %126, %127"
#define MSA_R64 MSA_R32_0 ", " MSA_R32_32
#define MSA_R128 MSA_R64 ", " MSA_R32_64 ", " MSA_R32_96

// One instruction. REGISTERS lists D; A, B, P, TA, TB (A0 .. T) are the numbers of the operands
// that follow it.
#define MSA_WGMMA_SS(N, REGISTERS, D, A, B, P, TA, TB)                                         \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                         \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS    \
               "}, %" #A ", %" #B ", p, 1, 1, %" #TA ", %" #TB ";\n}\n"                        \
               : D                                                                             \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kA)), \
                 "n"(static_cast<int>(kB)))
#define MSA_WGMMA_RS(N, REGISTERS, D, A0, A1, A2, A3, B, P, T)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #P                                        \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTERS   \
               "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #T ";\n}\n" \
               : D                                                                            \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                          \
                 "r"(static_cast<int>(accumulate)), "n"(static_cast<int>(kB)))

/// D = A B (+ D when `accumulate`). A and B from shared memory, by descriptor
/// (tile/shared_tile.cuh).
template <BLayout kB = BLayout::kKMajor, ALayout kA = ALayout::kKMajor>
__device__ inline void wgmma(float (&d)[8], uint64_t a, uint64_t b, bool accumulate) {
  MSA_WGMMA_SS(16, MSA_R8, MSA_D8(0), 8, 9, 10, 11, 12);
}
template <BLayout kB = BLayout::kKMajor, ALayout kA = ALayout::kKMajor>
__device__ inline void wgmma(float (&d)[32], uint64_t a, uint64_t b, bool accumulate) {
  MSA_WGMMA_SS(64, MSA_R32_0, MSA_D32(0), 32, 33, 34, 35, 36);
}
template <BLayout kB = BLayout::kKMajor, ALayout kA = ALayout::kKMajor>
__device__ inline void wgmma(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  MSA_WGMMA_SS(128, MSA_R64, MSA_D64, 64, 65, 66, 67, 68);
}
template <BLayout kB = BLayout::kKMajor, ALayout kA = ALayout::kKMajor>
__device__ inline void wgmma(float (&d)[128], uint64_t a, uint64_t b, bool accumulate) {
  MSA_WGMMA_SS(256, MSA_R128, MSA_D128, 128, 129, 130, 131, 132);
}

/// A from registers (layout above).
template <BLayout kB = BLayout::kKMajor>
__device__ inline void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  MSA_WGMMA_RS(64, MSA_R32_0, MSA_D32(0), 32, 33, 34, 35, 36, 37, 38);
}
template <BLayout kB = BLayout::kKMajor>
__device__ inline void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  MSA_WGMMA_RS(128, MSA_R64, MSA_D64, 64, 65, 66, 67, 68, 69, 70);
}
template <BLayout kB = BLayout::kKMajor>
__device__ inline void wgmma(float (&d)[128], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  MSA_WGMMA_RS(256, MSA_R128, MSA_D128, 128, 129, 130, 131, 132, 133, 134);
}

#undef MSA_WGMMA_SS
#undef MSA_WGMMA_RS
#undef MSA_D8
#undef MSA_D32
#undef MSA_D64
#undef MSA_D128
#undef MSA_R8
#undef MSA_R32_0
#undef MSA_R32_32
#undef MSA_R32_64
#undef MSA_R32_96
#undef MSA_R64
#undef MSA_R128

}  // namespace msa::cuda::ptx
