// Matrix products of one warp: D[16,8] += A[16,16] B[16,8], bf16 in, f32 out, all in registers.
// For tiles of few rows, where a wgmma's 64 would be mostly padding.
//
// Lane l holds of D: d[2*h + e] = row l/4 + 8*h, column 2*(l%4) + e; of A: a[2*c + h] = row l/4 +
// 8*h, columns 8*c + 2*(l%4) + {0,1}; of B: b[c] = rows 8*c + 2*(l%4) + {0,1}, column l/4.
#pragma once

#include <cstdint>

#include "cuda/ptx/barrier.cuh"

namespace msa::cuda::ptx {

/// d: four registers.
__device__ inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/// Four 8x8 matrices of 16-bit elements from shared memory. Lane l points at row l%8 (16 bytes) of
/// matrix l/8 and receives of matrix i in m[i]: row l/4, columns 2*(l%4) + {0,1}.
__device__ inline void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The reverse: row l%8 of matrix l/8 is where lane l points.
__device__ inline void store_matrices(void* row, const uint32_t (&m)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
      : "memory");
}
/// load_matrices of the transposed matrices: rows 2*(l%4) + {0,1}, column l/4.
__device__ inline void load_matrices_transposed(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace msa::cuda::ptx
