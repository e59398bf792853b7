// Philox4x32-7 (Salmon et al., SC 2011), keyed by the 64-bit index of (batch, head, query, group of four keys): fused_attn/dropout.py.
#pragma once

#include "fused_attn/tensor.cuh"

namespace fused_attn {

__device__ inline uint4 philox(uint64_t counter, uint64_t seed) {
  uint4 w = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t first = static_cast<uint64_t>(w.x) * 0xD2511F53u, second = static_cast<uint64_t>(w.z) * 0xCD9E8D57u;
    w = {static_cast<uint32_t>(second >> 32) ^ w.y ^ k0, static_cast<uint32_t>(second), static_cast<uint32_t>(first >> 32) ^ w.w ^ k1,
         static_cast<uint32_t>(first)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return w;
}

// The words of keys [4 * (kv / 4), + 4) in row r = (b * heads + h) * q_len + q.
__device__ __noinline__ inline uint4 dropout_words(const DropoutParams& dropout, int64_t r, int kv, int kv_len) {
  return philox(static_cast<uint64_t>(r) * ((kv_len + 3) / 4) + kv / 4, static_cast<uint64_t>(*dropout.seed));
}

// Whether the key stays.
__device__ inline bool is_kept(const DropoutParams& dropout, const uint4& words, int kv) {
  const int lane = kv % 4;
  return (lane == 0 ? words.x : lane == 1 ? words.y : lane == 2 ? words.z : words.w) >= dropout.limit;
}

// 0 where the key is removed, 1 / (1 - p) where it stays.
__device__ inline float keep_factor(const DropoutParams& dropout, const uint4& words, int kv) {
  return is_kept(dropout, words, kv) ? dropout.factor : 0.f;
}

}  // namespace fused_attn
