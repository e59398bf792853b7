// Addressing and element types. Offsets are 64-bit: tensors beyond 2^31 elements and strides beyond int32 work.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "fused_attn/params.h"

namespace fused_attn {

using bfloat16 = __nv_bfloat16;

template <class T>
__device__ __forceinline__ T* at(const Matrix& m, int b, int h, int row, int col) {
  return static_cast<T*>(m.data) + (b * m.batch + h * m.head + row * m.row + col * m.col);
}

template <class T>
__device__ __forceinline__ float to_float(T x);
template <>
__device__ __forceinline__ float to_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}
template <>
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}

template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float(float x) {
  return __float2bfloat16_rn(x);
}

// Two neighbours as one register.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 h = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&h);
}

// Sixteen bytes of neighbours. Words, not elements: from single 16-bit elements the compiler makes stores of four bytes.
template <class T>
__device__ __forceinline__ uint4 pack_chunk(const float (&x)[16 / sizeof(T)]) {
  if constexpr (sizeof(T) == 2) return {pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7])};
  else return {__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3])};
}

// An element of a tensor whose dtype is known at run time only (biases, sinks).
__device__ inline float load(const Matrix& m, DType dtype, int b, int h, int row, int col) {
  switch (dtype) {
    case DType::kHalf: return to_float(*at<const __half>(m, b, h, row, col));
    case DType::kBFloat16: return to_float(*at<const __nv_bfloat16>(m, b, h, row, col));
    default: return *at<const float>(m, b, h, row, col);
  }
}

__device__ inline void store(const Matrix& m, DType dtype, int b, int h, int row, int col, float x) {
  switch (dtype) {
    case DType::kHalf: *at<__half>(m, b, h, row, col) = from_float<__half>(x); break;
    case DType::kBFloat16: *at<__nv_bfloat16>(m, b, h, row, col) = from_float<__nv_bfloat16>(x); break;
    default: *at<float>(m, b, h, row, col) = x;
  }
}

}  // namespace fused_attn
