// Products of shared tiles and register tiles on tensor cores, one interface for float16, bfloat16 and float32.
//
// float32 is cut into three bfloat16 terms by truncation, 8 bits each: together they are the number, exactly. Six of the nine products of
// terms carry everything above 2^-24, so the result is as good as float32 arithmetic (a 3xTF32 scheme loses two bits at the same cost).
#pragma once

#include "fused_attn/ptx/ldmatrix.cuh"
#include "fused_attn/ptx/mma.cuh"
#include "fused_attn/tile.cuh"

namespace fused_attn {

template <class T>
constexpr int kTerms = sizeof(T) == 4 ? 3 : 1;

// a [16, 16] as rows g and g + 8; b [16, 8] twice, for 16 neighbouring columns of the result.
template <class T>
struct FragmentA {
  uint32_t x[kTerms<T>][4];
};
template <class T>
struct FragmentB {
  uint32_t x[kTerms<T>][2][2];
};

// The upper 16 bits of a number and what is left; an infinity has no rest.
__device__ __forceinline__ float truncate(float x, float& rest) {
  const float high = __uint_as_float(__float_as_uint(x) & 0xffff0000u);
  rest = fabsf(x) == INFINITY ? 0.f : x - high;
  return high;
}

// Terms of two neighbours, packed.
__device__ __forceinline__ void split(uint32_t& high, uint32_t& middle, uint32_t& low, float x, float y) {
  float rx, ry, sx, sy;
  const float hx = truncate(x, rx), hy = truncate(y, ry), mx = truncate(rx, sx), my = truncate(ry, sy);
  constexpr uint32_t kUpperHalves = 0x7632;
  high = __byte_perm(__float_as_uint(hx), __float_as_uint(hy), kUpperHalves);
  middle = __byte_perm(__float_as_uint(mx), __float_as_uint(my), kUpperHalves);
  low = __byte_perm(__float_as_uint(sx), __float_as_uint(sy), kUpperHalves);
}

// Rows [row, row + 16), columns [col, col + 16) of a tile.
template <class T, class Tile>
__device__ __forceinline__ void load_a(FragmentA<T>& a, const Tile& tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    ptx::ldmatrix_x4(a.x[0], tile.at(row + lane % 16, col + lane / 16 * 8));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = *reinterpret_cast<const float2*>(tile.at(row + lane / 4 + i % 2 * 8, col + lane % 4 * 2 + i / 2 * 8));
      split(a.x[0][i], a.x[1][i], a.x[2][i], p.x, p.y);
    }
  }
}

// b^T: the tile's rows [row, row + 16) are columns of the result, its columns [col, col + 16) are summed over.
template <class T, class Tile>
__device__ __forceinline__ void load_b_transposed(FragmentB<T>& b, const Tile& tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    ptx::ldmatrix_x4(r, tile.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8));
    b.x[0][0][0] = r[0], b.x[0][0][1] = r[1], b.x[0][1][0] = r[2], b.x[0][1][1] = r[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = *reinterpret_cast<const float2*>(tile.at(row + lane / 4 + i / 2 * 8, col + lane % 4 * 2 + i % 2 * 8));
      split(b.x[0][i / 2][i % 2], b.x[1][i / 2][i % 2], b.x[2][i / 2][i % 2], p.x, p.y);
    }
  }
}

// b: the tile's rows [row, row + 16) are summed over, its columns [col, col + 16) are columns of the result.
template <class T, class Tile>
__device__ __forceinline__ void load_b(FragmentB<T>& b, const Tile& tile, int row, int col) {
  const int lane = threadIdx.x % 32;
  if constexpr (sizeof(T) == 2) {
    uint32_t r[4];
    ptx::ldmatrix_x4_trans(r, tile.at(row + lane % 16, col + lane / 16 * 8));
    b.x[0][0][0] = r[0], b.x[0][0][1] = r[1], b.x[0][1][0] = r[2], b.x[0][1][1] = r[3];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int k = row + lane % 4 * 2 + i % 2 * 8, n = col + lane / 4 + i / 2 * 8;
      split(b.x[0][i / 2][i % 2], b.x[1][i / 2][i % 2], b.x[2][i / 2][i % 2], *tile.at(k, n), *tile.at(k + 1, n));
    }
  }
}

// Two accumulator blocks [16, 8] side by side as a [16, 16] operand: the layouts agree.
template <class T>
__device__ __forceinline__ void from_accumulators(FragmentA<T>& a, const float (&left)[4], const float (&right)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float x = i < 2 ? left[i % 2 * 2] : right[i % 2 * 2], y = i < 2 ? left[i % 2 * 2 + 1] : right[i % 2 * 2 + 1];
    if constexpr (sizeof(T) == 2) a.x[0][i] = pack<T>(x, y);
    else split(a.x[0][i], a.x[1][i], a.x[2][i], x, y);
  }
}

// d [16, 16] += a b. The terms of float32 are added up by themselves, small ones first, and join the sum once: a long sum that took
// every product's rounding would err seven times as much as eager (measured at head size 256).
// kInfinities: whether a product with an infinity has to be one, and not NaN.
template <class T, bool kInfinities = true>
__device__ __forceinline__ void mma(float (&left)[4], float (&right)[4], const FragmentA<T>& a, const FragmentB<T>& b) {
  if constexpr (sizeof(T) == 2) {
    ptx::mma_m16n8k16<T>(left, a.x[0], b.x[0][0]);
    ptx::mma_m16n8k16<T>(right, a.x[0], b.x[0][1]);
  } else {
    float part[2][4] = {};
#pragma unroll
    for (int order = 2; order >= 0; --order) {
      if (kInfinities && order == 0) {
        // What an infinity leaves for the smaller terms is inf - inf; only the product of the largest terms says what it means.
#pragma unroll
        for (int i = 0; i < 4; ++i) part[0][i] = isnan(part[0][i]) ? 0.f : part[0][i], part[1][i] = isnan(part[1][i]) ? 0.f : part[1][i];
      }
#pragma unroll
      for (int i = 0; i <= order; ++i) {
        ptx::mma_m16n8k16<bfloat16>(part[0], a.x[i], b.x[order - i][0]);
        ptx::mma_m16n8k16<bfloat16>(part[1], a.x[i], b.x[order - i][1]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] += part[0][i], right[i] += part[1][i];
  }
}

// s [16, kN] = rows [row, row + 16) of a, times the rows of b: a b^T over kDepth columns.
template <class T, int kDepth, int kN, class TileA, class TileB>
__device__ __forceinline__ void multiply_transposed(float (&s)[kN][4], const TileA& a, int row, const TileB& b) {
#pragma unroll
  for (int n = 0; n < kN; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.f;
  // float32 unrolled further than this piles up terms of later columns in registers and spills.
#pragma unroll(sizeof(T) == 2 ? kDepth / 16 : 2)
  for (int k = 0; k < kDepth; k += 16) {
    FragmentA<T> fa;
    load_a(fa, a, row, k);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      FragmentB<T> fb;
      load_b_transposed(fb, b, n * 8, k);
      mma<T>(s[n], s[n + 1], fa, fb);
    }
  }
}

// acc [16, kCols * 8] += p [16, kN * 8] times columns [col, ...) of the rows of b.
template <class T, bool kInfinities = true, int kN, int kCols, class Tile>
__device__ __forceinline__ void multiply_add(float (&acc)[kCols][4], const float (&p)[kN][4], const Tile& b, int col = 0) {
#pragma unroll
  for (int k = 0; k < kN; k += 2) {
    FragmentA<T> fa;
    from_accumulators<T>(fa, p[k], p[k + 1]);
#pragma unroll
    for (int n = 0; n < kCols; n += 2) {
      FragmentB<T> fb;
      load_b(fb, b, k * 8, col + n * 8);
      mma<T, kInfinities>(acc[n], acc[n + 1], fa, fb);
    }
  }
}

}  // namespace fused_attn
