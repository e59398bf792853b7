// Matrix products of one tile, on vectors: against keys or values packed into panels, and against rows as they lie.
#pragma once

#include "cpu/simd.h"

namespace fused_attn::cpu {
namespace {

// Accumulators of the two products. Panels: 8 x 2 vectors of 32 registers, 6 x 2 of 16; rows: 6 x 4 and 6 x 2. A core of AVX-512 reaches
// 110 to 116 GFLOP/s with these, torch's batched product at attention's shapes 65 to 77.
#if defined(__AVX512F__)
constexpr int kPanelRows = 8, kWide = 4;
#else
constexpr int kPanelRows = 6, kWide = 2;
#endif
constexpr int kPanelVectors = 2, kRows = 6;
constexpr int64_t kPanel = kPanelVectors * W;  // keys of a panel

// acc[i][j] += sum over k of a[i * a_row + k * a_step] * b[k * b_row + j * W ...].
template <int M, int N>
FUSED_ATTN_INLINE void accumulate(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                                  vf (&acc)[M][N]) {
  for (int64_t k = 0; k < depth; ++k) {
    vf row[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) row[j] = load(b + k * b_row + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const vf x = all(a[i * a_row + k * a_step]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) acc[i][j] += x * row[j];
    }
  }
}

template <int M, int N>
FUSED_ATTN_INLINE void clear(vf (&acc)[M][N]) {
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) acc[i][j] = vf{};
}

// A factor of a product: element (i, k) at data[i * row + k * step].
struct Factor {
  const float* data;
  int64_t row, step;
};

template <int M, int N>
FUSED_ATTN_INLINE void add_tile(int64_t depth, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, bool first) {
  vf acc[M][N];
  clear(acc);
  accumulate<M, N>(depth, a.data, a.row, a.step, b, b_row, acc);
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      float* to = c + i * c_row + j * W;
      store(to, first ? acc[i][j] : load(to) + acc[i][j]);
    }
}

template <int N>
inline void add_columns(int64_t rows, int64_t depth, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row, bool first) {
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    add_tile<kRows, N>(depth, {a.data + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row, first);
  for (; i + 2 <= rows; i += 2) add_tile<2, N>(depth, {a.data + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row, first);
  if (i < rows) add_tile<1, N>(depth, {a.data + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row, first);
}

// c[rows x width] (+)= a[rows x depth] b[depth x width]; width is a multiple of W. The product is summed from zero and added then: one long
// sum over all keys had 1.8 to 2.6 times the error of plain torch.
inline void add_product(int64_t rows, int64_t depth, int64_t width, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                        bool first) {
  int64_t d = 0;
  for (; d + kWide * W <= width; d += kWide * W) add_columns<kWide>(rows, depth, a, b + d, b_row, c + d, c_row, first);
  if (kWide > 2 && d + 2 * W <= width) {
    add_columns<2>(rows, depth, a, b + d, b_row, c + d, c_row, first);
    d += 2 * W;
  }
  if (d < width) add_columns<1>(rows, depth, a, b + d, b_row, c + d, c_row, first);
}

// c (+)= a b over the pairs that `allowed` [rows x depth bytes] names, element by element: for factors with NaN or infinities, of which
// nothing may reach another pair. `transposed`: allowed is [depth x rows].
inline void add_allowed(int64_t rows, int64_t depth, int64_t width, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                        const uint8_t* allowed, int64_t allowed_row, int64_t allowed_step) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t k = 0; k < depth; ++k) {
      if (!allowed[i * allowed_row + k * allowed_step]) continue;
      const vf x = all(a.data[i * a.row + k * a.step]);
      for (int64_t d = 0; d < width; d += W) {
        float* to = c + i * c_row + d;
        store(to, load(to) + x * load(b + k * b_row + d));
      }
    }
}

}  // namespace
}  // namespace fused_attn::cpu
