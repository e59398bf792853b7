// What every attention kernel shares: which (batch, head, tile) a block works on, which keys its rows reach, and scores of one tile.
#pragma once

#include "fused_attn/fragment.cuh"
#include "fused_attn/mask.cuh"
#include "fused_attn/online_softmax.cuh"
#include "fused_attn/philox.cuh"

namespace fused_attn {

// Keys that any row of a block reaches, [low, high), and keys that every row may attend to by its interval, [full_low, full_high).
struct Reach {
  int low, high, full_low, full_high;

  __device__ bool covers(int first, int end) const { return first >= full_low && end <= full_high; }
};

// Of rows [first, first + kRows); rows beyond q_len do not count. Every warp computes it, so no barrier is needed.
template <int kRows>
__device__ Reach reach(const MaskParams& mask, int b, int first, const Sizes& sizes) {
  Reach all = {sizes.kv_len, 0, 0, sizes.kv_len};
  for (int r = threadIdx.x % 32; r < kRows; r += 32) {
    if (first + r >= sizes.q_len) continue;
    const Interval keys = row_interval(mask, b, first + r, sizes);
    if (!keys.empty()) all.low = min(all.low, keys.start), all.high = max(all.high, keys.end);
    all.full_low = max(all.full_low, keys.start), all.full_high = min(all.full_high, keys.end);
  }
  return {__reduce_min_sync(~0u, all.low), __reduce_max_sync(~0u, all.high), __reduce_max_sync(~0u, all.full_low),
          __reduce_min_sync(~0u, all.full_high)};
}

// A block's number as (tile, batch, head): tiles of one head are neighbours, the last ones first when kLastFirst, because with a causal
// mask they take longest.
struct BlockPlace {
  int tile, b, h;

  __device__ BlockPlace(int tiles, int heads, bool last_first) {
    const int bh = blockIdx.x / tiles;
    tile = blockIdx.x % tiles;
    if (last_first) tile = tiles - 1 - tile;
    b = bh / heads, h = bh % heads;
  }
};

// One of the two rows that a thread holds of its warp's 16.
struct Row {
  int q;
  Interval keys;
};

// The rows of a thread: g and g + 8 of its warp's 16, which begin at `first`.
__device__ __forceinline__ Row own_row(const MaskParams& mask, int b, int first, int half, const Sizes& sizes) {
  const int q = first + threadIdx.x % 32 / 4 + half * 8;
  return {q, row_interval(mask, b, q, sizes)};
}

// Number of a row in [batch, heads, q_len].
__device__ __forceinline__ int64_t row_number(const Sizes& sizes, int b, int h, int q) {
  return (static_cast<int64_t>(b) * sizes.heads + h) * sizes.q_len + q;
}

// Whether a pair may attend. `full`: every pair of the tile may; `state`: what keep says of the tile.
__device__ __forceinline__ bool allows(const MaskParams& mask, int b, int h, const Row& row, int kv, bool full, int state) {
  return full || (row.keys.contains(kv) && (state == 2 || kept(mask, b, h, row.q, kv)));
}

// The next tile of keys from `first` on that is not empty by the summary of keep, or `end`.
__device__ __forceinline__ int next_tile(const MaskParams& mask, int b, int h, int q_tile, int first, int end, int block_kv) {
  while (first < end && tile_state(mask, b, h, q_tile, first / block_kv) == 0) first += block_kv;
  return first;
}

// Products of a warp's rows to scores, -inf where a query may not attend: s [16, kN * 8] of queries x keys [first, ...).
template <bool kModified, int kN>
__device__ __forceinline__ void to_scores(float (&s)[kN][4], const AttentionParams& p, const Scorer<kModified>& scorer, int b, int h,
                                          const Row (&rows)[2], int first, bool full, int state) {
  if (full && scorer.is_raw()) return;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const Row& row = rows[e / 2];
      const int kv = first + n * 8 + threadIdx.x % 4 * 2 + e % 2;
      const bool ok = allows(p.mask, b, h, row, kv, full, state);
      if (!scorer.is_raw() && ok && row.q < p.sizes.q_len) s[n][e] = scorer.score(s[n][e], {b, h, row.q, kv});
      if (!ok) s[n][e] = -INFINITY;
    }
  }
}

// Multiplies by 0 where dropout removes and by `kept` elsewhere; two neighbouring keys share a call of Philox.
template <int kN>
__device__ __forceinline__ void drop(float (&s)[kN][4], const DropoutParams& dropout, int b, int h, const Row (&rows)[2], int first,
                                     float kept) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int kv = first + n * 8 + threadIdx.x % 4 * 2;
      const uint32_t stays = kept_keys<2>(dropout, b, h, rows[half].q, kv);
      s[n][half * 2] = stays & 1 ? s[n][half * 2] * kept : 0.f;
      s[n][half * 2 + 1] = stays & 2 ? s[n][half * 2 + 1] * kept : 0.f;
    }
  }
}

}  // namespace fused_attn
