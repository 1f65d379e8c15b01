// Matrix tiles, written once for every instruction set.
//
// A matrix product C [rows,cols] = A [rows,depth] B [depth,cols] reads A as plain rows and B as
// panels:
//
//     panel p holds columns p*kCols .. p*kCols+kCols-1 as [depth/kPair][kCols][kPair]
//
// so that one step of the inner loop reads one contiguous line (kPair consecutive depths of each
// column lie together, as the 16-bit dot instructions want). Keys become panels by a transpose
// (columns = keys), values as they are (columns = channels): both products of attention are the
// same loop.
//
// The vocabulary an instruction set `Isa` provides:
//   Elem, Vec          element of A and B; vector of kLanes floats
//   kLanes kRows kCols kPair kDepthStep kChunk     (kDepthStep: depth granularity of `tile`)
//   zero set1 load store add mul fma max exp2 reduce_max reduce_add
//   load_as<T>(p)      kLanes elements of dtype T as floats;  store_as<T>(p, v) the way back
//   load_unit<T>(p)    kLanes*kPair elements of dtype T as one vector of 32-bit units of Elem
//   interleave(a,b,d)  kPair == 2: kCols elements of two rows zipped into d
//   store_p(p, v)      kLanes floats as Elem (kPair == 2; floats are stored as they are)
//   transpose(v)       kLanes x kLanes 32-bit units
//   tile<R>(...)       the register tile; kScatters: its rows of C may lie anywhere
//   begin, end         around the work of a thread
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>

#include "core/sequence.h"
#include "cpu/generic/limits.h"
#include "msa/backend.h"

#define MSA_INLINE inline __attribute__((always_inline))

namespace msa::cpu {

inline constexpr int64_t kPiece = 128;  // keys packed at a time: K and V panels stay in L2
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
alignas(64) inline constexpr std::byte kZeroRow[kMaxHeadDim * 4]{};  // stands for rows past the end

MSA_INLINE constexpr int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
MSA_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
MSA_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/// Calls body<T>() with the compile-time dtype; 16-bit pair kernels only ever see bf16.
template <class Isa, class Body>
MSA_INLINE void with_dtype(DType dtype, const Body& body) {
  if constexpr (Isa::kPair == 2) {
    body.template operator()<DType::kBF16>();
  } else {
    switch (dtype) {
      case DType::kBF16:
        return body.template operator()<DType::kBF16>();
      case DType::kF16:
        return body.template operator()<DType::kF16>();
      default:
        return body.template operator()<DType::kF32>();
    }
  }
}

/// Consecutive arrays in the slice of workspace that belongs to one worker; without memory it only
/// counts bytes.
class Arena {
 public:
  explicit MSA_INLINE Arena(std::byte* base) : base_(base) {}
  template <class T>
  MSA_INLINE T* take(int64_t count) {
    T* p = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + used_);
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return p;
  }
  MSA_INLINE int64_t used() const { return used_; }

 private:
  std::byte* base_;
  int64_t used_ = 0;
};

/// Depth of the panels of a head dim.
template <class Isa>
MSA_INLINE constexpr int64_t padded_depth(int64_t depth) {
  return round_up(depth, Isa::kDepthStep);
}

/// The register tile shared by the vector instruction sets: R rows x kCols columns stay in
/// registers over the depth.
template <class Isa, int R>
MSA_INLINE void register_tile(const typename Isa::Elem* a, int64_t lda,
                              const typename Isa::Elem* panel, int64_t depth, float* const* c,
                              int64_t col, bool add) {
  using Vec = typename Isa::Vec;
  constexpr int kVecs = Isa::kCols / Isa::kLanes;
  Vec sum[R][kVecs];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      sum[r][v] = add ? Isa::load(c[r] + col + v * Isa::kLanes) : Isa::zero();
  }
#pragma GCC unroll 4
  for (int64_t d = 0; d < depth; d += Isa::kPair) {
    Vec line[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      line[v] = Isa::load_line(panel + d * Isa::kCols + v * Isa::kLanes * Isa::kPair);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec x = Isa::broadcast(a + r * lda + d);
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sum[r][v] = Isa::dot(x, line[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) Isa::store(c[r] + col + v * Isa::kLanes, sum[r][v]);
  }
}

/// The register tile of the `rows` left: exactly as many when rows may lie anywhere (kScatters),
/// else rounded up to half or whole tiles (the buffers are padded).
template <class Isa, int R = Isa::kRows>
MSA_INLINE void tile_of(int64_t rows, const typename Isa::Elem* a, int64_t lda,
                        const typename Isa::Elem* panel, int64_t depth, float* const* c,
                        int64_t ldc, int64_t col, bool add) {
  constexpr int kLess = Isa::kScatters ? R - 1 : R / 2;
  if constexpr (R == 1 || (!Isa::kScatters && R < Isa::kRows)) {
    Isa::template tile<R>(a, lda, panel, depth, c, ldc, col, add);
  } else if (rows > kLess) {
    Isa::template tile<R>(a, lda, panel, depth, c, ldc, col, add);
  } else {
    tile_of<Isa, kLess>(rows, a, lda, panel, depth, c, ldc, col, add);
  }
}

/// c[r][0..cols) = (add: +=) a[r] . panels. The rows of C lie anywhere when Isa::kScatters, else
/// ldc apart. Columns come in multiples of kCols, depth of kDepthStep; panels lie `panel_stride`
/// elements apart (depth * kCols when they are that deep). A stays in L1 while one panel after the
/// other streams by: call with at most kChunk rows.
template <class Isa>
void gemm(const typename Isa::Elem* a, int64_t lda, int64_t rows, const typename Isa::Elem* panels,
          int64_t panel_stride, int64_t depth, int64_t cols, float* const* c, int64_t ldc,
          bool add) {
  for (int64_t col = 0; col < cols; col += Isa::kCols, panels += panel_stride) {
    for (int64_t r = 0; r < rows; r += Isa::kRows) {
      tile_of<Isa>(rows - r, a + r * lda, lda, panels, depth, c + r, ldc, col, add);
    }
  }
}

/// Row i of `rows`, or zeros past n.
template <DType T>
MSA_INLINE const std::byte* row_or_zero(const BlockRows& rows, int64_t i, int64_t n) {
  return i < n ? rows.data + i * rows.token_stride * size_of(T) : kZeroRow;
}

/// Up to `count` rows from i0 on, each readable over `width` elements: in place where the length
/// allows it, else copied behind each other into `padded` and filled up with zeros.
template <DType T>
MSA_INLINE void readable_rows(const BlockRows& rows, int64_t i0, int64_t n, int64_t count,
                              int64_t length, int64_t width, std::byte* padded,
                              const std::byte** out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = row_or_zero<T>(rows, i0 + i, n);
    if (length == width || out[i] == kZeroRow) continue;
    std::byte* copy = padded + i * width * size_of(T);
    std::memset(copy, 0, static_cast<size_t>(width * size_of(T)));
    std::memcpy(copy, out[i], static_cast<size_t>(length * size_of(T)));
    out[i] = copy;
  }
}

/// Keys [n,depth] as panels with one column per key; missing columns and depths become zeros.
template <class Isa, DType T>
void pack_keys_as(const BlockRows& keys, int64_t n, int64_t depth, typename Isa::Elem* panels) {
  constexpr int64_t kLanes = Isa::kLanes;
  constexpr int64_t kStep = kLanes * Isa::kPair;  // depths per transpose
  alignas(64) std::byte padded[static_cast<size_t>(kLanes * (kMaxHeadDim + 64) * 4)];
  const int64_t width = round_up(depth, kStep);
  const int64_t deep = padded_depth<Isa>(depth);
  for (int64_t col = 0; col < n; col += kLanes) {
    const std::byte* row[kLanes];
    readable_rows<T>(keys, col, n, kLanes, depth, width, padded, row);
    float* panel =
        reinterpret_cast<float*>(panels + col / Isa::kCols * Isa::kCols * deep) + col % Isa::kCols;
    for (int64_t d = 0; d < depth; d += kStep) {
      typename Isa::Vec unit[kLanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i)
        unit[i] = Isa::template load_unit<T>(row[i] + d * size_of(T));
      Isa::transpose(unit);
      const int64_t left = (deep - d) / Isa::kPair;  // never write behind the panel
#pragma GCC unroll 16
      for (int64_t i = 0; i < kLanes; ++i) {
        if (i < left) Isa::store(panel + (d / Isa::kPair + i) * Isa::kCols, unit[i]);
      }
    }
    for (int64_t d = width; d < deep; d += Isa::kPair)
      Isa::store(panel + d / Isa::kPair * Isa::kCols, Isa::zero());
  }
  // A last panel that the keys only begin: its other columns are zero.
  for (int64_t col = round_up(n, kLanes); col % Isa::kCols != 0; col += kLanes) {
    float* panel =
        reinterpret_cast<float*>(panels + col / Isa::kCols * Isa::kCols * deep) + col % Isa::kCols;
    for (int64_t d = 0; d < deep; d += Isa::kPair)
      Isa::store(panel + d / Isa::kPair * Isa::kCols, Isa::zero());
  }
}

/// Values [n,dim] as panels with one column per channel and one depth per key, zero rows up to
/// `deep` keys.
template <class Isa, DType T>
void pack_values_as(const BlockRows& values, int64_t n, int64_t deep, int64_t dim,
                    typename Isa::Elem* panels) {
  alignas(64) std::byte padded[static_cast<size_t>(2 * (kMaxHeadDim + 64) * 4)];
  const int64_t width = round_up(dim, Isa::kCols);
  for (int64_t key = 0; key < deep; key += Isa::kPair) {
    const std::byte* row[Isa::kPair];
    readable_rows<T>(values, key, n, Isa::kPair, dim, width, padded, row);
    typename Isa::Elem* line = panels + key * Isa::kCols;
    for (int64_t col = 0; col < width; col += Isa::kCols, line += deep * Isa::kCols) {
      if constexpr (Isa::kPair == 2) {
        Isa::interleave(row[0] + col * size_of(T), row[1] + col * size_of(T), line);
      } else {
#pragma GCC unroll 4
        for (int64_t v = 0; v < Isa::kCols; v += Isa::kLanes) {
          Isa::store(line + v, Isa::template load_as<T>(row[0] + (col + v) * size_of(T)));
        }
      }
    }
  }
}

/// One query row [dim] as a row of A with zeros up to the panels' depth.
template <class Isa, DType T>
MSA_INLINE void load_query(const std::byte* q, int64_t dim, typename Isa::Elem* a) {
  if constexpr (Isa::kPair == 2) {
    std::memcpy(a, q, static_cast<size_t>(dim * size_of(T)));
  } else {
    int64_t d = 0;
    for (; d + Isa::kLanes <= dim; d += Isa::kLanes)
      Isa::store(a + d, Isa::template load_as<T>(q + d * size_of(T)));
    if (d < dim) {
      alignas(64) std::byte padded[Isa::kLanes * 4]{};
      alignas(64) float tail[Isa::kLanes];
      std::memcpy(padded, q + d * size_of(T), static_cast<size_t>((dim - d) * size_of(T)));
      Isa::store(tail, Isa::template load_as<T>(padded));
      std::memcpy(a + d, tail, static_cast<size_t>((dim - d) * 4));
    }
  }
  for (int64_t d = dim; d < padded_depth<Isa>(dim); ++d) a[d] = {};
}

/// One row of floats, times `factor`, as dtype T.
template <class Isa, DType T>
MSA_INLINE void store_row(const float* x, float factor, int64_t dim, std::byte* out) {
  const typename Isa::Vec f = Isa::set1(factor);
  int64_t d = 0;
  for (; d + Isa::kLanes <= dim; d += Isa::kLanes) {
    Isa::template store_as<T>(out + d * size_of(T), Isa::mul(Isa::load(x + d), f));
  }
  if (d < dim) {
    alignas(64) std::byte tail[Isa::kLanes * 4];
    Isa::template store_as<T>(tail, Isa::mul(Isa::load(x + d), f));  // rows of x are padded
    std::memcpy(out + d * size_of(T), tail, static_cast<size_t>((dim - d) * size_of(T)));
  }
}

/// Queries of a tile: `wanted`, or fewer (down to 16) where that would leave threads without work.
/// Rows do not feel the cut: each is the same sums in the same order in any tile.
MSA_INLINE int64_t balanced_tile(int64_t wanted, const Limits& limits, int64_t tasks_per_tile) {
  int64_t tile = least(most(wanted, 1), 256);
  while (tile > 16 && limits.max_tokens * tasks_per_tile < 2 * tile * limits.max_threads) tile /= 2;
  return tile;
}

/// Keys [n,depth] as panels; `dtype` is that of the tensor.
template <class Isa>
void pack_keys(DType dtype, const BlockRows& keys, int64_t n, int64_t depth,
               typename Isa::Elem* panels) {
  with_dtype<Isa>(dtype, [&]<DType T>() { pack_keys_as<Isa, T>(keys, n, depth, panels); });
}

template <class Isa>
void pack_values(DType dtype, const BlockRows& values, int64_t n, int64_t deep, int64_t dim,
                 typename Isa::Elem* panels) {
  with_dtype<Isa>(dtype, [&]<DType T>() { pack_values_as<Isa, T>(values, n, deep, dim, panels); });
}

/// Whether rows [begin,end) hold a NaN or an infinity: 0 times that is not 0.
template <class Isa, DType T>
bool has_non_finite_as(const BlockRows& rows, int64_t begin, int64_t end, int64_t dim) {
  alignas(64) std::byte padded[(kMaxHeadDim + 64) * 4];
  const int64_t width = round_up(dim, Isa::kLanes);
  for (int64_t i = begin; i < end; ++i) {
    const std::byte* row = nullptr;
    readable_rows<T>(rows, i, end, 1, dim, width, padded, &row);
    typename Isa::Vec sum = Isa::zero();
    for (int64_t d = 0; d < width; d += Isa::kLanes)
      sum = Isa::fma(Isa::template load_as<T>(row + d * size_of(T)), Isa::zero(), sum);
    if (Isa::reduce_add(sum) != 0) return true;
  }
  return false;
}

template <class Isa>
bool has_non_finite(DType dtype, const BlockRows& rows, int64_t begin, int64_t end, int64_t dim) {
  bool found = false;
  with_dtype<Isa>(dtype,
                  [&]<DType T>() { found = has_non_finite_as<Isa, T>(rows, begin, end, dim); });
  return found;
}

/// Query heads [head0, head0+heads) of tokens [token0, token0+tokens) as rows of A, heads of a
/// token together.
template <class Isa>
void load_queries(const TensorView& q, int64_t token0, int64_t tokens, int64_t head0, int64_t heads,
                  typename Isa::Elem* a, int64_t lda) {
  const int64_t dim = q.shape[2];
  const int64_t element = size_of(q.dtype);
  with_dtype<Isa>(q.dtype, [&]<DType T>() {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t h = 0; h < heads; ++h, a += lda) {
        const int64_t offset = (token0 + t) * q.stride[0] + (head0 + h) * q.stride[1];
        load_query<Isa, T>(static_cast<const std::byte*>(q.data) + offset * element, dim, a);
      }
    }
  });
}

/// What no query sees, from `valid` on: -inf, or +inf before a negative factor.
MSA_INLINE void hide_invisible(float* s, int64_t valid, int64_t cols, float hidden = -kInfinity) {
  for (int64_t c = valid; c < cols; ++c) s[c] = hidden;
}

/// Maximum of a row; NaN counts as -inf. Two chains: one would wait for itself.
template <class Isa>
MSA_INLINE float row_max(const float* s, int64_t cols) {
  typename Isa::Vec even = Isa::set1(-kInfinity), odd = even;
  for (int64_t c = 0; c < cols; c += 2 * Isa::kLanes) {
    even = Isa::max(Isa::load(s + c), even);
    odd = Isa::max(Isa::load(s + c + Isa::kLanes), odd);
  }
  return Isa::reduce_max(Isa::max(even, odd));
}

/// Tiles of `tile_q` queries that the longest sequence takes.
MSA_INLINE int64_t tiles_of(const Batch& batch, int64_t tile_q) {
  int64_t longest = 0;
  for (int64_t b = 0; b < batch_size(batch); ++b)
    longest = most(longest, sequence(batch, b, 1).q_len);
  return (longest + tile_q - 1) / tile_q;
}

/// Runs body(task, worker) on the queue's threads, or here.
template <class Body>
void for_each_task(Queue queue, int64_t tasks, const Body& body) {
  if (queue.threads != nullptr) {
    queue.threads->parallel_for(tasks, body);
  } else {
    for (int64_t task = 0; task < tasks; ++task) body(task, 0);
  }
}

}  // namespace msa::cpu
