// Rows of any dtype and stride as float32, and back.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fused_attn::cpu {
namespace {

FUSED_ATTN_INLINE int64_t width_of(int64_t dtype) { return dtype == kFloat ? 4 : dtype == kDouble ? 8 : 2; }

FUSED_ATTN_INLINE char* at(const Matrix& m, int64_t b, int64_t h, int64_t i, int64_t j) {
  return m.data + (b * m.batch + h * m.head + i * m.row + j * m.col) * width_of(m.dtype);
}

// [multiples of the vector]
FUSED_ATTN_INLINE int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

FUSED_ATTN_INLINE float from_bits(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

FUSED_ATTN_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}

// IEEE binary16; denormals and NaN included.
inline float from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  return from_bits(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8f));  // rest * 2^-24
}

inline uint16_t to_half(float x) {
  const uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, rest = u & 0x7fffffff;
  if (rest > 0x7f800000) return sign | 0x7e00;
  if (rest >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (rest < 0x38800000) {                       // below 2^-14: a multiple of 2^-24, rounded by the adder
    const float shifted = from_bits(rest) + 0.5f;
    return sign | (bits_of(shifted) - 0x3f000000);
  }
  return sign | ((rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13);
}

FUSED_ATTN_INLINE vf from_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX2__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = from_half(p[i]);
  return x;
#endif
}

FUSED_ATTN_INLINE void to_halves(uint16_t* p, vf x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int i = 0; i < W; ++i) p[i] = to_half(x[i]);
#endif
}

FUSED_ATTN_INLINE vf from_bfloats(const uint16_t* p) {
  return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_mem*>(p), vu) << 16);
}

// To the nearest, ties to even; a NaN stays one.
FUSED_ATTN_INLINE void to_bfloats(uint16_t* p, vf x) {
  const vu u = (vu)x, rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const vu one = vu{} + 0x7fc0;
  *reinterpret_cast<vh_mem*>(p) = __builtin_convertvector((vu)(x == x ? (vi)rounded : (vi)one), vh);
}

FUSED_ATTN_INLINE float load_one(const char* p, int64_t dtype) {
  uint16_t h;
  double d;
  float f;
  switch (dtype) {
    case kHalf: memcpy(&h, p, 2); return from_half(h);
    case kBFloat16: memcpy(&h, p, 2); return from_bits(static_cast<uint32_t>(h) << 16);
    case kDouble: memcpy(&d, p, 8); return static_cast<float>(d);
    default: memcpy(&f, p, 4); return f;
  }
}

FUSED_ATTN_INLINE void store_one(char* p, int64_t dtype, float x) {
  uint16_t h;
  double d = x;
  switch (dtype) {
    case kHalf:
      h = to_half(x);
      memcpy(p, &h, 2);
      break;
    case kBFloat16: {
      const uint32_t u = bits_of(x);
      h = x == x ? static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16) : 0x7fc0;
      memcpy(p, &h, 2);
      break;
    }
    case kDouble: memcpy(p, &d, 8); break;
    default: memcpy(p, &x, 4);
  }
}

// n elements, `step` apart, as float32 in `to`.
inline void load_row(const char* p, int64_t dtype, int64_t step, int64_t n, float* to) {
  int64_t i = 0;
  if (step == 1 && dtype == kFloat) {
    memcpy(to, p, static_cast<size_t>(n) * 4);
    return;
  }
  if (step == 1 && dtype == kHalf)
    for (; i + W <= n; i += W) store(to + i, from_halves(reinterpret_cast<const uint16_t*>(p) + i));
  if (step == 1 && dtype == kBFloat16)
    for (; i + W <= n; i += W) store(to + i, from_bfloats(reinterpret_cast<const uint16_t*>(p) + i));
  const int64_t bytes = step * width_of(dtype);
  for (; i < n; ++i) to[i] = load_one(p + i * bytes, dtype);
}

// n float32 into elements `step` apart.
inline void store_row(char* p, int64_t dtype, int64_t step, int64_t n, const float* from) {
  int64_t i = 0;
  if (step == 1 && dtype == kFloat) {
    memcpy(p, from, static_cast<size_t>(n) * 4);
    return;
  }
  if (step == 1 && dtype == kHalf)
    for (; i + W <= n; i += W) to_halves(reinterpret_cast<uint16_t*>(p) + i, load(from + i));
  if (step == 1 && dtype == kBFloat16)
    for (; i + W <= n; i += W) to_bfloats(reinterpret_cast<uint16_t*>(p) + i, load(from + i));
  const int64_t bytes = step * width_of(dtype);
  for (; i < n; ++i) store_one(p + i * bytes, dtype, from[i]);
}

// Writes one byte of every page of n elements that are about to be written: pages that are new come from the kernel one after another,
// which costs it a fifth less than a page now and then between other work (67 million new elements, one core: 119 ms of system time against
// 97).
inline void touch_pages(char* p, int64_t dtype, int64_t step, int64_t n) {
  if (step != 1) return;
  for (int64_t byte = 0; byte < n * width_of(dtype); byte += 4096) *static_cast<volatile char*>(p + byte) = 0;
}

// Columns j .. j + n of a row as float32: where they lie if they can be read there, else copied into `room`. Reading ends at column j + n.
inline const float* row_of(const Matrix& m, int64_t b, int64_t h, int64_t i, int64_t j, int64_t n, float* room) {
  const char* p = at(m, b, h, i, j);
  if (m.dtype == kFloat && m.col == 1 && n % W == 0) return reinterpret_cast<const float*>(p);
  load_row(p, m.dtype, m.col, n, room);
  return room;
}

}  // namespace
}  // namespace fused_attn::cpu
