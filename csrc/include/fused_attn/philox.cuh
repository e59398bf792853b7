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

__device__ inline uint32_t kept_words(const uint4& words, uint32_t limit) {
  return (words.x >= limit) | (words.y >= limit) << 1 | (words.z >= limit) << 2 | (words.w >= limit) << 3;
}

// The words of the group of keys that a key belongs to, turned so that its own is word kv % 4: where every register is taken, a caller that
// had to know the shift would spill (dk and dv of float32 at head size 256).
__device__ __noinline__ inline uint4 dropout_words(const DropoutParams& dropout, int b, int h, int q, int kv) {
  const uint64_t counter = dropout.first + b * dropout.batch + h * dropout.head + q * dropout.row + (kv + dropout.shift) / 4;
  uint4 w = philox(counter, static_cast<uint64_t>(*dropout.seed));
  const int shift = dropout.shift;
  if (shift & 1) w = {w.y, w.z, w.w, w.x};
  if (shift & 2) w = {w.z, w.w, w.x, w.y};
  return w;
}

// Whether the key stays, from its words.
__device__ inline bool is_kept(const DropoutParams& dropout, const uint4& words, int kv) {
  const int lane = kv % 4;
  return (lane == 0 ? words.x : lane == 1 ? words.y : lane == 2 ? words.z : words.w) >= dropout.limit;
}

// Bit j: whether key kv + j stays. Keys of one group share a call; kCount of them reach into a second one where their origin is no multiple
// of 4.
template <int kCount>
__device__ __noinline__ uint32_t kept_keys(const DropoutParams& dropout, int b, int h, int q, int kv) {
  static_assert(kCount <= 4);
  const int key = kv + dropout.shift, lane = key % 4;
  const uint64_t counter = dropout.first + b * dropout.batch + h * dropout.head + q * dropout.row + key / 4;
  const uint64_t seed = static_cast<uint64_t>(*dropout.seed);
  uint32_t bits = kept_words(philox(counter, seed), dropout.limit);
  if (lane + kCount > 4) bits |= kept_words(philox(counter + 1, seed), dropout.limit) << 4;
  return bits >> lane;
}

}  // namespace fused_attn
