// Vectors of W floats: the compiler's vector extensions, and intrinsics only where those have no spelling. Included by kernel units alone,
// which are compiled once per instruction set; everything here has internal linkage, so that no unit's code can stand in for another's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define FUSED_ATTN_INLINE inline __attribute__((always_inline))

namespace fused_attn::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef float vf_mem __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint8_t vb_mem __attribute__((vector_size(W), aligned(1), may_alias));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef uint16_t vh_mem __attribute__((vector_size(W * 2), aligned(1), may_alias));

constexpr float kInf = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

FUSED_ATTN_INLINE vf all(float x) { return x - vf{}; }
FUSED_ATTN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
FUSED_ATTN_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_mem*>(p) = x; }
FUSED_ATTN_INLINE vf select(vi where, vf a, vf b) { return where ? a : b; }
// x itself, which the compiler may not join with what comes before or after: a product that is rounded here is rounded before it is added.
FUSED_ATTN_INLINE vf rounded(vf x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}
// -1 where the byte is not 0.
FUSED_ATTN_INLINE vi is_set(const uint8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))) != 0;
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))) != 0;
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_mem*>(p), vi) != 0;
#endif
}

// The larger; b where either is NaN.
FUSED_ATTN_INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

FUSED_ATTN_INLINE vf smaller(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// sum + a * b with as many roundings as products of vectors have: one where the processor can, since compilers contract those.
FUSED_ATTN_INLINE float added(float sum, float a, float b) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, sum);
#else
  return sum + a * b;
#endif
}

// The nearest whole number, for |x| < 2^22.
FUSED_ATTN_INLINE vf whole(vf x) {
#if defined(__AVX512F__)
  return (vf)_mm512_roundscale_ps((__m512)x, 8);
#elif defined(__AVX2__)
  return (vf)_mm256_round_ps((__m256)x, 8);
#else
  const vf magic = all(12582912.f);
  return (x + magic) - magic;
#endif
}

// -1 in the first n lanes.
FUSED_ATTN_INLINE vi lanes_below(int64_t n) {
  vi lane;
  for (int i = 0; i < W; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n);
}

// The first n <= W floats, `rest` in the other lanes.
FUSED_ATTN_INLINE vf load_part(const float* p, int64_t n, float rest) {
#if defined(__AVX512F__)
  return (vf)_mm512_mask_loadu_ps((__m512)all(rest), static_cast<__mmask16>((1u << n) - 1), p);
#elif defined(__AVX2__)
  const vi first = lanes_below(n);
  return select(first, (vf)_mm256_maskload_ps(p, (__m256i)first), all(rest));
#else
  float t[W];
  for (int i = 0; i < W; ++i) t[i] = i < n ? p[i] : rest;
  return load(t);
#endif
}

FUSED_ATTN_INLINE void store_part(float* p, int64_t n, vf x) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)x);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)lanes_below(n), (__m256)x);
#else
  for (int i = 0; i < n; ++i) p[i] = x[i];
#endif
}

// -1 where one of the first n <= W bytes is not 0.
FUSED_ATTN_INLINE vi is_set_part(const uint8_t* p, int64_t n) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << n) - 1), p)) != 0;
#else
  uint8_t t[W];
  for (int i = 0; i < W; ++i) t[i] = i < n ? p[i] : 0;
  return is_set(t);
#endif
}

// Every lane the one whose index differs in bit K.
template <int K>
FUSED_ATTN_INLINE vf swapped(vf x) {
#if defined(__AVX512F__)
  if constexpr (K < 4) return (vf)_mm512_permute_ps((__m512)x, K == 1 ? 0xB1 : 0x4E);
  return (vf)_mm512_shuffle_f32x4((__m512)x, (__m512)x, K == 4 ? 0xB1 : 0x4E);
#elif defined(__AVX2__)
  if constexpr (K < 4) return (vf)_mm256_permute_ps((__m256)x, K == 1 ? 0xB1 : 0x4E);
  return (vf)_mm256_permute2f128_ps((__m256)x, (__m256)x, 1);
#else
  vf y;
  for (int i = 0; i < W; ++i) y[i] = x[i ^ K];
  return y;
#endif
}

// Without a temporal hint: the lines go to memory past the caches. p is aligned to the vector.
FUSED_ATTN_INLINE void stream(float* p, vf x) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)x);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)x);
#else
  store(p, x);
#endif
}

FUSED_ATTN_INLINE void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

FUSED_ATTN_INLINE float sum_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float t[W], s = 0.f;
  store(t, x);
  for (int i = 0; i < W; ++i) s += t[i];
  return s;
#endif
}

// A NaN may get lost.
FUSED_ATTN_INLINE float largest_of(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float t[W], top = -kInf;
  store(t, x);
  for (int i = 0; i < W; ++i) top = t[i] > top ? t[i] : top;
  return top;
#endif
}

// e^x for x <= 0 (and up to 88): below 1 ulp, NaN stays NaN. Argument reduction in two steps (Cody and Waite) and a polynomial of degree 6
// with Cephes' coefficients. Gradual underflow with AVX-512; zeros below 2^-126 elsewhere.
FUSED_ATTN_INLINE vf exp_of(vf x) {
#if defined(__AVX512F__)
  x = larger(all(-104.f), x);
#else
  const vi tiny = x < -87.3f;
  x = smaller(all(88.f), larger(all(-87.3f), x));  // masked pairs may lie above their row's largest score
#endif
  const vf n = whole(x * 1.44269504088896341f);
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const vf y = p * (r * r) + r + 1.f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)y, (__m512)n);
#else
  // A NaN has no whole number to convert; it passes through y.
  const vf known = select(x == x, n, vf{});
  const vu power = (vu) __builtin_convertvector(known, vi) << 23;
  return select(tiny, vf{}, select(x == x, (vf)((vu)y + power), y));
#endif
}

// exp_of for x <= 0 with gradual underflow on every CPU, below 2 ulp.
FUSED_ATTN_INLINE vf small_exp_of(vf x) {
#if defined(__AVX512F__)
  return exp_of(x);
#else
  const vf root = exp_of(x * 0.5f);
  return select(x < -87.f, root * root, exp_of(x));
#endif
}

// tanh below 1.5 ulp, exactly 1 where float32 says so, NaN stays NaN: a polynomial with Cephes' coefficients up to 0.625, (1 - t) / (1 + t)
// with t = exp(-2 |x|) beyond.
FUSED_ATTN_INLINE vf tanh_of(vf x) {
  const vf size = x < 0.f ? -x : x, x2 = x * x;
  vf p = all(-5.70498872745e-3f);
  p = p * x2 + 2.06390887954e-2f;
  p = p * x2 + -5.37397155531e-2f;
  p = p * x2 + 1.33314422036e-1f;
  p = p * x2 + -3.33332819422e-1f;
  const vf near = p * x2 * x + x, t = exp_of(size * -2.f), far = (1.f - t) / (1.f + t);
  return select(size < 0.625f, near, select(x < 0.f, -far, far));
}

// W rows of W numbers become columns.
FUSED_ATTN_INLINE void transpose(vf (&r)[W]) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps((__m512)r[i], (__m512)r[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps((__m512)r[i], (__m512)r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  // b[4 i + j] holds column 4 lane + j of rows 4 i ..; the lanes of four of them change places.
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    const __m512 low = _mm512_shuffle_f32x4(b[j], b[4 + j], 0x44), high = _mm512_shuffle_f32x4(b[j], b[4 + j], 0xee);
    const __m512 low2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0x44), high2 = _mm512_shuffle_f32x4(b[8 + j], b[12 + j], 0xee);
    r[j] = (vf)_mm512_shuffle_f32x4(low, low2, 0x88);
    r[4 + j] = (vf)_mm512_shuffle_f32x4(low, low2, 0xdd);
    r[8 + j] = (vf)_mm512_shuffle_f32x4(high, high2, 0x88);
    r[12 + j] = (vf)_mm512_shuffle_f32x4(high, high2, 0xdd);
  }
#elif defined(__AVX2__)
  __m256 a[8], b[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps((__m256)r[i], (__m256)r[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps((__m256)r[i], (__m256)r[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m256d x = _mm256_castps_pd(a[i + j]), y = _mm256_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(x, y));
      b[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(x, y));
    }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = (vf)_mm256_permute2f128_ps(b[j], b[4 + j], 0x20);
    r[4 + j] = (vf)_mm256_permute2f128_ps(b[j], b[4 + j], 0x31);
  }
#else
  for (int i = 0; i < W; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = r[i][j];
      r[i][j] = r[j][i];
      r[j][i] = x;
    }
#endif
}

// Whether every one of n floats is finite; a sum that overflows says no, which costs time alone.
FUSED_ATTN_INLINE bool are_finite(const float* p, int64_t n) {
  vf s{};
  int64_t i = 0;
  for (; i + W <= n; i += W) s += load(p + i) * 0.f;
  float t = sum_of(s);
  for (; i < n; ++i) t += p[i] * 0.f;
  return t == 0.f;
}

}  // namespace
}  // namespace fused_attn::cpu
