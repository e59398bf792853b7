// Philox4x32-7 (Salmon et al., SC 2011), keyed by the 64-bit index of (batch, head, query, group of four keys): fused_attn/dropout.py.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fused_attn::cpu {
namespace {

// The 64-bit products of every lane with a number, as two words.
FUSED_ATTN_INLINE void multiply_words(vu a, uint32_t m, vu& high, vu& low) {
#if defined(__AVX512F__)
  const __m512i x = (__m512i)a, y = _mm512_set1_epi32(static_cast<int>(m));
  const __m512i even = _mm512_mul_epu32(x, y), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), y);
  low = (vu)_mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  high = (vu)_mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
#elif defined(__AVX2__)
  const __m256i x = (__m256i)a, y = _mm256_set1_epi32(static_cast<int>(m));
  const __m256i even = _mm256_mul_epu32(x, y), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), y);
  low = (vu)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  high = (vu)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
#else
  for (int i = 0; i < W; ++i) {
    const uint64_t product = static_cast<uint64_t>(a[i]) * m;
    low[i] = static_cast<uint32_t>(product);
    high[i] = static_cast<uint32_t>(product >> 32);
  }
#endif
}

// Words of the W counters from `counter` on.
FUSED_ATTN_INLINE void philox(uint64_t counter, uint64_t seed, vu (&words)[4]) {
  vu lane;
  for (int i = 0; i < W; ++i) lane[i] = static_cast<uint32_t>(i);
  const uint32_t base = static_cast<uint32_t>(counter);
  vu c0 = lane + base;
  vu c1 = (vu{} + static_cast<uint32_t>(counter >> 32)) - (vu)(c0 < base);  // the carry: a comparison gives -1
  vu c2{}, c3{};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 7; ++round) {
    vu high0, low0, high1, low1;
    multiply_words(c0, 0xD2511F53u, high0, low0);
    multiply_words(c2, 0xCD9E8D57u, high1, low1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

// Writes factor where a word stays and 0 elsewhere, for the 4 W keys of W groups in order.
FUSED_ATTN_INLINE void write_factors(const vu (&words)[4], uint32_t limit, vf factor, float* to) {
#if defined(__AVX512F__)
  const __m512i w0 = (__m512i)words[0], w1 = (__m512i)words[1], w2 = (__m512i)words[2], w3 = (__m512i)words[3];
  const __m512i a = _mm512_unpacklo_epi32(w0, w1), b = _mm512_unpackhi_epi32(w0, w1), c = _mm512_unpacklo_epi32(w2, w3),
                d = _mm512_unpackhi_epi32(w2, w3);
  const __m512i r0 = _mm512_unpacklo_epi64(a, c), r1 = _mm512_unpackhi_epi64(a, c), r2 = _mm512_unpacklo_epi64(b, d),
                r3 = _mm512_unpackhi_epi64(b, d);
  const __m512i t0 = _mm512_shuffle_i32x4(r0, r1, 0x44), t1 = _mm512_shuffle_i32x4(r2, r3, 0x44), t2 = _mm512_shuffle_i32x4(r0, r1, 0xee),
                t3 = _mm512_shuffle_i32x4(r2, r3, 0xee);
  const vu in_order[4] = {(vu)_mm512_shuffle_i32x4(t0, t1, 0x88), (vu)_mm512_shuffle_i32x4(t0, t1, 0xdd),
                          (vu)_mm512_shuffle_i32x4(t2, t3, 0x88), (vu)_mm512_shuffle_i32x4(t2, t3, 0xdd)};
  for (int t = 0; t < 4; ++t) store(to + t * W, select((vi)(in_order[t] >= limit), factor, vf{}));
#else
  for (int i = 0; i < W; ++i)
    for (int t = 0; t < 4; ++t) to[4 * i + t] = words[t][i] >= limit ? factor[0] : 0.f;
#endif
}

// Room that `dropout_row` needs for n keys.
FUSED_ATTN_INLINE int64_t dropout_room(int64_t n) { return (n + 4 + 4 * W - 1) / (4 * W) * (4 * W); }

// 1 / (1 - p) for keys that stay and 0 for the others, of keys j0 .. j0 + n of one row; where they begin in `room`.
inline const float* dropout_row(const Dropout& d, int64_t b, int64_t h, int64_t q, int64_t j0, int64_t n, float* room) {
  const int64_t key = j0 + d.shift, lane = key % 4, groups = (lane + n + 3) / 4;
  if (d.limit >> 32) {  // p rounds to 1
    memset(room, 0, static_cast<size_t>(n) * 4);
    return room;
  }
  const uint64_t counter = static_cast<uint64_t>(d.first + b * d.batch + h * d.head + q * d.row + key / 4);
  for (int64_t g = 0; g < groups; g += W) {
    vu words[4];
    philox(counter + static_cast<uint64_t>(g), static_cast<uint64_t>(*d.seed), words);
    write_factors(words, static_cast<uint32_t>(d.limit), all(static_cast<float>(d.factor)), room + 4 * g);
  }
  return room + lane;
}

}  // namespace
}  // namespace fused_attn::cpu
