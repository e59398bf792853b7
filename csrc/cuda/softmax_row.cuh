// What the softmax kernels share: which row a group of lanes owns, and chunks of 16 bytes of a row in registers.
#pragma once

#include "fused_attn/mask.cuh"
#include "fused_attn/online_softmax.cuh"
#include "fused_attn/philox.cuh"
#include "fused_attn/reduce.cuh"

namespace fused_attn {

// How a row of kv_len elements is spread: kLanes threads, each with kChunks chunks of 16 bytes (0: as many as the row has, in a loop).
template <int kLanesPerRow, int kChunksPerLane>
struct Spread {
  static constexpr int kLanes = kLanesPerRow, kChunks = kChunksPerLane;
  static constexpr int kThreads = kLanes > 128 ? kLanes : 128, kRows = kThreads / kLanes;
};

// Row number r = (b * heads + h) * q_len + q; rows beyond the last repeat it and write nothing.
struct SoftmaxRow {
  int64_t r;
  int b, h, q;
  bool live;
  Interval keys;

  __device__ SoftmaxRow(const SoftmaxParams& p, int64_t number) {
    const Sizes& sizes = p.sizes;
    const int64_t rows = static_cast<int64_t>(sizes.batch) * sizes.heads * sizes.q_len;
    live = number < rows;
    r = live ? number : rows - 1;
    q = r % sizes.q_len, h = r / sizes.q_len % sizes.heads, b = r / sizes.q_len / sizes.heads;
    keys = row_interval(p.mask, b, q, sizes);
  }

  __device__ bool allows(const SoftmaxParams& p, int kv) const { return keys.contains(kv) && kept(p.mask, b, h, q, kv); }

  // Bit j: whether the query may attend to key kv + j; bytes of keep are read together where they lie so.
  template <int kCount>
  __device__ uint32_t allowed(const SoftmaxParams& p, int kv) const {
    const int low = min(max(keys.start - kv, 0), kCount), high = min(max(keys.end - kv, 0), kCount);
    uint32_t bits = (1u << high) - (1u << min(low, high));
    const Matrix& keep = p.mask.keep;
    if (bits == 0 || keep.data == nullptr) return bits;
    if (keep.col == 1 && kv + kCount <= p.sizes.kv_len && reinterpret_cast<uintptr_t>(at<const uint8_t>(keep, b, h, q, kv)) % kCount == 0) {
      uint32_t bytes[kCount / 4];
      if constexpr (kCount == 4) bytes[0] = *reinterpret_cast<const uint32_t*>(at<const uint8_t>(keep, b, h, q, kv));
      else *reinterpret_cast<uint2*>(bytes) = *reinterpret_cast<const uint2*>(at<const uint8_t>(keep, b, h, q, kv));
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if ((bytes[j / 4] >> j % 4 * 8 & 0xff) == 0) bits &= ~(1u << j);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
        if ((bits >> j & 1) != 0 && !kept(p.mask, b, h, q, kv + j)) bits &= ~(1u << j);
      }
    }
    return bits;
  }
};

template <class T>
constexpr int kVector = 16 / sizeof(T);  // elements per chunk

// One row of a tensor, read and written by chunks.
template <class T>
struct RowView {
  T* row;
  int64_t stride;
  bool is_vector;

  __device__ RowView(const Matrix& m, const SoftmaxRow& place)
      : row(at<T>(m, place.b, place.h, place.q, 0)), stride(m.col), is_vector(m.col == 1 && reinterpret_cast<uintptr_t>(row) % 16 == 0) {}

  __device__ void load(float (&x)[kVector<T>], int kv, int kv_len) const {
    if (is_vector && kv + kVector<T> <= kv_len) {
      const uint4 bits = *reinterpret_cast<const uint4*>(row + kv);
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) x[j] = to_float(reinterpret_cast<const T*>(&bits)[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) x[j] = kv + j < kv_len ? to_float(row[(kv + j) * stride]) : 0.f;
    }
  }

  __device__ void store(const float (&x)[kVector<T>], int kv, int kv_len) const {
    if (is_vector && kv + kVector<T> <= kv_len) {
      __stwb(reinterpret_cast<uint4*>(row + kv), pack_chunk<T>(x));  // a plain assignment is cut into words in some unrolled copies
    } else {
#pragma unroll
      for (int j = 0; j < kVector<T>; ++j) {
        if (kv + j < kv_len) row[(kv + j) * stride] = from_float<T>(x[j]);
      }
    }
  }
};

// A chunk of scores, -inf where the query may not attend; what is masked is never used, whatever it holds.
template <class T>
__device__ __forceinline__ void load_scores(float (&x)[kVector<T>], const SoftmaxParams& p, const Scorer<true>& scorer,
                                            const RowView<const T>& view, const SoftmaxRow& row, int kv) {
  const uint32_t allowed = row.allowed<kVector<T>>(p, kv);
  view.load(x, kv, p.sizes.kv_len);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    x[j] = allowed >> j & 1 ? scorer.score(x[j], {row.b, row.h, row.q, kv + j}) : -INFINITY;
  }
}

// Multiplies a chunk by 0 where dropout removes and by 1 / (1 - p) where it does not; four neighbours share a call of Philox.
template <int kCount>
__device__ __forceinline__ void drop(float (&x)[kCount], const DropoutParams& dropout, const SoftmaxRow& row, int kv) {
#pragma unroll
  for (int j = 0; j < kCount; j += 4) {
    const uint32_t stays = kept_keys<4>(dropout, row.b, row.h, row.q, kv + j);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[j + i] = stays >> i & 1 ? x[j + i] * dropout.factor : 0.f;
  }
}

}  // namespace fused_attn
