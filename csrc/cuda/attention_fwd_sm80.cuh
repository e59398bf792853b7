// Flash attention forward (arXiv 2205.14135, 2307.08691) on mma.sync and cp.async: a block owns a tile of queries, a warp 16 of them.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/configs.h"

namespace fused_attn {

template <class T, int kHeadSize>
struct Fwd {
  static constexpr TileShape kShape = tile_shape(Pass::kFwd, sizeof(T), kHeadSize);
  static constexpr int kThreads = kShape.q / 16 * 32 * kShape.split;
  using QTile = SharedTile<T, kShape.q, kHeadSize>;
  using KvTile = SharedTile<T, kShape.kv, kHeadSize>;
  static constexpr int kSharedBytes = QTile::kBytes + 2 * kShape.stages * KvTile::kBytes;
};

// 0 * NaN is NaN: a broken value must reach only rows that attend to it, so mixed tiles are cleaned of NaN and infinities first. When that
// happened, which is rare, this adds them to the written output of the rows that do attend; adding to full tiles again changes nothing.
template <class T>
__device__ __noinline__ void add_broken(const AttentionParams& p, int b, int h, int q_first, int q_count) {
  const Sizes& sizes = p.sizes;
  const Scorer<true> scorer(p.score);
  for (int i = threadIdx.x; i < q_count * sizes.value_dim; i += blockDim.x) {
    const int q = q_first + i / sizes.value_dim, col = i % sizes.value_dim;
    const Interval keys = row_interval(p.mask, b, q, sizes);
    if (keys.empty() || p.sum[row_number(sizes, b, h, q)] == 0.f) continue;
    for (int kv = keys.start; kv < keys.end; ++kv) {
      const T x = *at<const T>(p.v, b, h / sizes.group, kv, col);
      if (is_finite(x) || !kept(p.mask, b, h, q, kv)) continue;
      float product = 0.f;
      for (int d = 0; d < sizes.head_dim; ++d)
        product = fmaf(to_float(*at<const T>(p.q, b, h, q, d)), to_float(*at<const T>(p.k, b, h / sizes.group, kv, d)), product);
      const float weight = scorer.exponential(scorer.score(product, {b, h, q, kv}), p.top[row_number(sizes, b, h, q)]);
      const float added = weight == 0.f ? NAN : to_float(x);  // 0 * infinity
      T* out = at<T>(p.out, b, h, q, col);
      *out = from_float<T>(to_float(*out) + added);
      if (p.wide.data != nullptr) *at<float>(p.wide, b, h, q, col) += added;
    }
  }
}

// One tile of keys: s [16, kN * 8] becomes probabilities against the running maximum, acc and the rows' sums are rescaled.
template <bool kModified, int kN, int kCols>
__device__ __forceinline__ void rescale(float (&s)[kN][4], float (&acc)[kCols][4], RowState (&state)[2], const Scorer<kModified>& scorer) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float top = state[half].top;
#pragma unroll
    for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[n][half * 2], s[n][half * 2 + 1]));
    const float before = state[half].top;
    state[half].top = quad_max(top);
    const float base = state[half].base(), shrink = scorer.exponential(before, base);
    float sum = 0.f;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      s[n][half * 2] = scorer.exponential(s[n][half * 2], base);
      s[n][half * 2 + 1] = scorer.exponential(s[n][half * 2 + 1], base);
      sum += s[n][half * 2] + s[n][half * 2 + 1];
    }
    state[half].sum = state[half].sum * shrink + sum;
#pragma unroll
    for (int n = 0; n < kCols; ++n) acc[n][half * 2] *= shrink, acc[n][half * 2 + 1] *= shrink;
  }
}

// A sink joins only now: next to one that takes nearly all the weight, probabilities would vanish in 16 bits before they meet the values.
template <bool kModified, int kCols>
__device__ __forceinline__ void add_sink(float (&acc)[kCols][4], RowState& state, int half, float sink, const Scorer<kModified>& scorer) {
  const float highest = fmaxf(state.top, sink), base = highest == -INFINITY ? 0.f : highest, shrink = scorer.exponential(state.top, base);
#pragma unroll
  for (int n = 0; n < kCols; ++n) acc[n][half * 2] *= shrink, acc[n][half * 2 + 1] *= shrink;
  state.sum = state.sum * shrink + scorer.exponential(sink, base);
  state.top = highest;
}

template <class T, int kHeadSize, bool kModified>
__global__ void __launch_bounds__(Fwd<T, kHeadSize>::kThreads, 1) attention_fwd_kernel(const __grid_constant__ AttentionParams p) {
  using C = Fwd<T, kHeadSize>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kStages = C::kShape.stages, kN = kBlockKv / 8;
  constexpr int kCols = kHeadSize / 8 / C::kShape.split;  // blocks of 8 columns that a warp accumulates
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const BlockPlace place((sizes.q_len + kBlockQ - 1) / kBlockQ, sizes.heads, true);
  const int b = place.b, h = place.h, kv_h = h / sizes.group, q_first = place.tile * kBlockQ;
  const Reach near = reach<kBlockQ>(p.mask, b, q_first, sizes);
  const int warp_row = threadIdx.x / 32 / C::kShape.split * 16, warp_col = threadIdx.x / 32 % C::kShape.split * kCols * 8;
  const Row rows[2] = {own_row(p.mask, b, q_first + warp_row, 0, sizes), own_row(p.mask, b, q_first + warp_row, 1, sizes)};

  const RowSource<T> q_rows{p.q, b, h, 0, sizes.q_len, sizes.head_dim};
  const RowSource<T> k_rows{p.k, b, kv_h, near.low, near.high, sizes.head_dim}, v_rows{p.v, b, kv_h, near.low, near.high, sizes.value_dim};
  const typename C::QTile q_tile(shared);
  const auto stage = [&](int i) { return shared + C::QTile::kBytes + i * C::KvTile::kBytes; };
  const auto load_kv = [&](int i, int first) {
    typename C::KvTile(stage(2 * i)).template load<C::kThreads>(k_rows, first);
    typename C::KvTile(stage(2 * i + 1)).template load<C::kThreads>(v_rows, first);
  };

  const Scorer<kModified> scorer(p.score);
  float acc[kCols][4] = {};
  RowState state[2];
  int broken = 0;
  int first = next_tile(p.mask, b, h, place.tile, near.low / kBlockKv * kBlockKv, near.high, kBlockKv);
  q_tile.template load<C::kThreads>(q_rows, q_first);
  if (kStages > 1 && first < near.high) load_kv(0, first);
  ptx::cp_async_commit();
  for (int i = 0; first < near.high; i = (i + 1) % kStages) {
    const int following = next_tile(p.mask, b, h, place.tile, first + kBlockKv, near.high, kBlockKv);
    if (kStages == 1) load_kv(0, first);
    else if (following < near.high) load_kv((i + 1) % kStages, following);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();

    const typename C::KvTile k_tile(stage(2 * i)), v_tile(stage(2 * i + 1));
    const int keep = tile_state(p.mask, b, h, place.tile, first / kBlockKv);
    const bool full = keep == 2 && near.covers(first, first + kBlockKv);
    if (!full) broken |= __syncthreads_or(v_tile.template has_broken<C::kThreads, true>());
    float s[kN][4];
    multiply_transposed<T, kHeadSize>(s, q_tile, warp_row, k_tile);
    to_scores<kModified>(s, p, scorer, b, h, rows, first, full, keep);
    rescale<kModified>(s, acc, state, scorer);
    if (kModified && p.dropout.seed != nullptr) drop(s, p.dropout, b, h, rows, first, 1.f);
    multiply_add<T>(acc, s, v_tile, warp_col);
    __syncthreads();
    first = following;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    RowState& row = state[half];
    row.sum = quad_sum(row.sum);
    const bool empty = row.sum == 0.f;  // no keys, or scores of -inf alone
    if (kModified && p.sinks.data != nullptr) add_sink(acc, row, half, load(p.sinks, p.sinks_dtype, 0, h, 0, 0), scorer);
    const float total = row.sum == 0.f ? 1.f : row.sum;
    const float scale = (kModified && p.dropout.seed != nullptr ? p.dropout.factor : 1.f) / total;
    const int q = rows[half].q, local = q - q_first;
#pragma unroll
    for (int n = 0; n < kCols; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = empty ? 0.f : acc[n][half * 2 + e] * scale;
        const int col = warp_col + n * 8 + threadIdx.x % 4 * 2 + e;
        *q_tile.at(local, col) = from_float<T>(x);
        if (kModified && sizeof(T) == 2 && p.wide.data != nullptr && q < sizes.q_len && col < sizes.value_dim)
          *at<float>(p.wide, b, h, q, col) = x;
      }
    }
    if (threadIdx.x % 4 == 0 && warp_col == 0 && q < sizes.q_len) {
      const int64_t r = row_number(sizes, b, h, q);
      p.lse[r] = row.sum == 0.f ? -INFINITY : scorer.natural(row.base()) + logf(total);
      p.top[r] = row.top;
      p.sum[r] = empty ? 0.f : row.sum;
    }
  }
  __syncthreads();
  q_tile.template store<C::kThreads>(RowSource<T>{p.out, b, h, 0, sizes.q_len, sizes.value_dim}, q_first);
  if (broken) {
    __syncthreads();
    add_broken<T>(p, b, h, q_first, kBlockQ);
  }
}

}  // namespace fused_attn
