// A tile of rows in shared memory, its 16-byte chunks permuted so that neither ldmatrix nor fragment loads of float32 meet a bank twice.
#pragma once

#include "fused_attn/ptx/cp_async.cuh"
#include "fused_attn/tensor.cuh"

namespace fused_attn {

// Rows [low, high) of a [batch, heads, rows, cols] tensor at one (batch, head), `cols` columns wide; everything else reads as zero.
template <class T>
struct RowSource {
  const Matrix& matrix;
  int b, h, low, high, cols;

  __device__ const T* at(int row, int col) const { return fused_attn::at<const T>(matrix, b, h, row, col); }
  // Whether 16-byte copies can address every row.
  __device__ bool is_vector() const {
    constexpr int kChunk = 16 / sizeof(T);
    return matrix.col == 1 && matrix.row % kChunk == 0 && reinterpret_cast<uintptr_t>(at(0, 0)) % 16 == 0;
  }
};

template <class T>
__device__ __forceinline__ bool is_finite(T x) {
  return fabsf(to_float(x)) < INFINITY;
}

template <class T, int kRows, int kCols>
struct SharedTile {
  static constexpr int kChunk = 16 / sizeof(T);  // elements per 16 bytes
  static constexpr int kChunks = kCols / kChunk;
  static constexpr int kBytes = kRows * kCols * static_cast<int>(sizeof(T));
  static_assert(kChunks >= 8, "a row fills all banks");
  T* data;

  __device__ explicit SharedTile(void* p) : data(static_cast<T*>(p)) {}

  // 16-bit: eight consecutive rows (ldmatrix) take eight different chunks. float32: a half warp reads two chunks of rows r .. r + 3
  // or of every second row, so the permutation has to tell rows apart that differ in either of their lowest three bits.
  __device__ static int swizzled(int row, int chunk) {
    if constexpr (sizeof(T) == 2) return chunk ^ (row & 7);
    else return chunk ^ (((row ^ (row >> 1)) & 3) << 1);
  }

  __device__ T* at(int row, int col) const { return data + row * kCols + swizzled(row, col / kChunk) * kChunk + col % kChunk; }

  // Fills the tile from rows [first, first + kRows) with kThreads threads; complete after cp_async_wait and a barrier.
  template <int kThreads>
  __device__ void load(const RowSource<T>& source, int first) const {
    const bool vectors = source.is_vector();
#pragma unroll 4
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks * kChunk, row = first + r;
      const int count = row >= source.low && row < source.high ? min(max(source.cols - c, 0), kChunk) : 0;
      T* to = at(r, c);
      if (vectors) {
        // A copy of no bytes wants an aligned address as well: that of any row is, even beyond the tensor; the tensor's own need not be.
        ptx::cp_async(to, source.at(row, c), count * static_cast<int>(sizeof(T)));
      } else {
        for (int j = 0; j < kChunk; ++j) to[j] = j < count ? *source.at(row, c + j) : from_float<T>(0.f);
      }
    }
  }

  // Whether this thread's share holds a NaN or an infinity, which is replaced by zero when kClean.
  template <int kThreads, bool kClean>
  __device__ bool has_broken() const {
    bool broken = false;
#pragma unroll 1  // accumulators are alive around it
    for (int i = threadIdx.x; i < kRows * kCols; i += kThreads) {
      if (!is_finite(data[i])) {
        broken = true;
        if (kClean) data[i] = from_float<T>(0.f);
      }
    }
    return broken;
  }

  // Writes the tile to rows [first, ...) below `high` of a matrix.
  template <int kThreads>
  __device__ void store(const RowSource<T>& target, int first) const {
    const bool vectors = target.is_vector() && target.cols % kChunk == 0;
    for (int i = threadIdx.x; i < kRows * kChunks; i += kThreads) {
      const int r = i / kChunks, c = i % kChunks * kChunk, row = first + r;
      if (row >= target.high) continue;
      const T* from = at(r, c);
      T* to = const_cast<T*>(target.at(row, c));
      if (vectors) {
        if (c < target.cols) *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < kChunk && c + j < target.cols; ++j) to[j * target.matrix.col] = from[j];
      }
    }
  }
};

}  // namespace fused_attn
