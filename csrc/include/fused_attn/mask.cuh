// The one place where CUDA kernels read a mask: a row's interval of keys, and the test of one pair.
#pragma once

#include "fused_attn/tensor.cuh"

namespace fused_attn {

struct Interval {
  int start, end;  // half open; start >= end: the row is empty

  __device__ bool contains(int kv) const { return kv >= start && kv < end; }
  __device__ bool empty() const { return start >= end; }
};

__device__ inline int64_t query_shift(const Alignment& alignment, int b) {
  return alignment.shifts != nullptr ? alignment.shifts[b] : alignment.shift;
}

// A 64-bit index cut off at the ends of [0, length].
__device__ inline int within(int64_t index, int length) {
  return static_cast<int>(min(max(index, int64_t{0}), static_cast<int64_t>(length)));
}

// The keys of row q within [0, kv_len]; nothing for rows beyond q_len.
__device__ inline Interval row_interval(const MaskParams& mask, int b, int q, const Sizes& sizes) {
  if (q >= sizes.q_len) return {0, 0};
  int start = 0, end = sizes.kv_len;
  if (mask.alignment.shifts == nullptr) {  // in 32 bits, which saves registers
    const int position = q + mask.alignment.shift;
    if (mask.left >= 0) start = max(start, position - mask.left);
    if (mask.right >= 0) end = min(end, position + mask.right + 1);
  } else {
    const int64_t position = q + mask.alignment.shifts[b];
    if (mask.left >= 0) start = within(position - mask.left, sizes.kv_len);
    if (mask.right >= 0) end = within(position + mask.right + 1, sizes.kv_len);
  }
  if (mask.kv_start.data != nullptr) start = max(start, *at<const int>(mask.kv_start, b, 0, q, 0));
  if (mask.kv_end.data != nullptr) end = min(end, *at<const int>(mask.kv_end, b, 0, q, 0));
  return {start, end};
}

// Whether keep, where there is one, lets the pair through; (q, kv) must lie inside the problem.
__device__ inline bool kept(const MaskParams& mask, int b, int h, int q, int kv) {
  return mask.keep.data == nullptr || *at<const uint8_t>(mask.keep, b, h, q, kv) != 0;
}

// What keep says of tile (q_tile, kv_tile): 0 nothing, 1 mixed, 2 everything.
__device__ inline int tile_state(const MaskParams& mask, int b, int h, int q_tile, int kv_tile) {
  return mask.summary.data == nullptr ? 2 : *at<const int8_t>(mask.summary, b, h, q_tile, kv_tile);
}

}  // namespace fused_attn
