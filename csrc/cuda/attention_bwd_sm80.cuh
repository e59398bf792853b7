// Flash attention backward (arXiv 2205.14135) in passes that recompute the probabilities tile by tile: `delta` gives each row's sum of
// p * dp, `dq` walks over keys, `dkdv` over queries (and the query heads of a group). Every gradient is summed by one block in a fixed
// order, so it is bit-reproducible without atomics.
#pragma once

#include "cuda/attention_aux_sm80.cuh"

namespace fused_attn {

// delta[row] = sum(out * dout) + sum(probs * dprobs) - dlse, one warp per row. Left alone, ptxas keeps float32 to 32 registers on sm_100,
// and spills one.
template <class T>
__global__ void __launch_bounds__(128, 1) attention_bwd_delta_kernel(const __grid_constant__ AttentionParams p) {
  const Sizes& sizes = p.sizes;
  const int64_t r = static_cast<int64_t>(blockIdx.x) * 4 + threadIdx.x / 32, bh = r / sizes.q_len;
  if (bh >= static_cast<int64_t>(sizes.batch) * sizes.heads) return;
  const int q = r % sizes.q_len, b = bh / sizes.heads, h = bh % sizes.heads, lane = threadIdx.x % 32;
  float total = 0.f;
  if (p.dout.data != nullptr) {
    for (int d = lane; d < sizes.value_dim; d += 32) {
      const float out = p.wide.data != nullptr ? *at<const float>(p.wide, b, h, q, d) : to_float(*at<const T>(p.out, b, h, q, d));
      // A row without keys is zeros whatever arrives at it, and 0 * NaN is NaN.
      if (out != 0.f) total = fmaf(out, to_float(*at<const T>(p.dout, b, h, q, d)), total);
    }
  }
  if (p.dprobs.data != nullptr) {
    const Interval keys = row_interval(p.mask, b, q, sizes);
    for (int kv = keys.start + lane; kv < keys.end; kv += 32) {
      if (!kept(p.mask, b, h, q, kv)) continue;
      total = fmaf(to_float(*at<const T>(p.probs, b, h, q, kv)), to_float(*at<const T>(p.dprobs, b, h, q, kv)), total);
    }
  }
  for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(~0u, total, offset);
  if (lane == 0) p.delta[r] = total - (p.dlse.data != nullptr ? *at<const float>(p.dlse, b, h, q, 0) : 0.f);
}

// A row's statistics and delta.
struct GradientRow : RowStatistics {
  float delta = 0.f;

  __device__ GradientRow(const AttentionParams& p, int b, int h, int q) : RowStatistics(p, b, h, q) {
    if (q < p.sizes.q_len) delta = p.delta[row_number(p.sizes, b, h, q)];
  }
};

// One pair: the product s becomes the weight that met the values, dp (the gradient of that weight) the score's gradient before modification
// `down_to`; both 0 where the pair may not attend and in rows without scores.
template <class T, bool kModified>
__device__ __forceinline__ void pair_gradient(float& s, float& dp, bool ok, bool stays, const AttentionParams& p,
                                              const Scorer<kModified>& scorer, const GradientRow& row, Place place, int down_to) {
  ok = ok && row.inverse != 0.f;
  const float product = s, score = ok ? scorer.score(product, place) : -INFINITY;
  const float probability = scorer.exponential(score, row.top) * row.inverse;
  float arriving = dp, weight = probability;
  if (kModified && p.dropout.seed != nullptr) {
    arriving = stays ? dp * p.dropout.factor : 0.f;
    weight = stays ? probability * p.dropout.factor : 0.f;
  }
  if (kModified && ok && p.dprobs.data != nullptr) arriving += to_float(*at<const T>(p.dprobs, place.b, place.h, place.q, place.kv));
  float gradient = probability * (arriving - row.delta);
  if (kModified && ok && p.dscores.data != nullptr) {
    // Float32 has no register left for a choice at head size 256; its caller converts.
    if constexpr (sizeof(T) == 2) gradient += load(p.dscores, p.dscores_dtype, place.b, place.h, place.q, place.kv);
    else gradient += to_float(*at<const T>(p.dscores, place.b, place.h, place.q, place.kv));
  }
  if (kModified && ok && p.score.count > 0) gradient = pull_back(p.score, gradient, product * p.score.scale, place, down_to);
  s = ok ? weight : 0.f;
  dp = ok ? gradient : 0.f;
}

template <class T, int kHeadSize, Pass kPass>
struct Dq {
  static constexpr TileShape kShape = tile_shape(kPass, sizeof(T), kHeadSize);
  static constexpr int kThreads = kShape.q / 16 * 32 * kShape.split;
  using QTile = SharedTile<T, kShape.q, kHeadSize>;
  using KvTile = SharedTile<T, kShape.kv, kHeadSize>;
  static constexpr int kSharedBytes = 2 * QTile::kBytes + 2 * kShape.stages * KvTile::kBytes;
};

// Gradients of the scores [16, kN * 8] of a warp's queries and a tile of keys, from the products s = q k^T and dp = dout v^T.
template <class T, bool kModified, int kN>
__device__ __forceinline__ void score_gradients(float (&s)[kN][4], float (&dp)[kN][4], const AttentionParams& p,
                                                const Scorer<kModified>& scorer, int b, int h, const Row (&rows)[2],
                                                const GradientRow (&gradient_rows)[2], int first, bool full, int keep, int down_to) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int q = rows[half].q, kv = first + n * 8 + threadIdx.x % 4 * 2;
      uint32_t stays = 0;
      if (kModified && p.dropout.seed != nullptr) stays = kept_keys<2>(p.dropout, b, h, q, kv);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool ok = allows(p.mask, b, h, rows[half], kv + e, full, keep) && q < p.sizes.q_len;
        pair_gradient<T>(s[n][half * 2 + e], dp[n][half * 2 + e], ok, stays >> e & 1, p, scorer, gradient_rows[half], {b, h, q, kv + e},
                         down_to);
      }
    }
  }
}

// NaN in the written dq of rows that attend to a broken key, in its broken columns: what its product with the row's score gradient is.
template <class T>
__device__ __noinline__ void mark_queries(const AttentionParams& p, int b, int h, int q_first, int count) {
  const Sizes& sizes = p.sizes;
  for (int i = threadIdx.x; i < count * sizes.head_dim; i += blockDim.x) {
    const int q = q_first + i / sizes.head_dim, col = i % sizes.head_dim;
    const Interval keys = row_interval(p.mask, b, q, sizes);
    if (keys.empty() || p.sum[row_number(sizes, b, h, q)] == 0.f) continue;
    for (int kv = keys.start; kv < keys.end; ++kv) {
      if (!is_finite(*at<const T>(p.k, b, h / sizes.group, kv, col)) && kept(p.mask, b, h, q, kv))
        *at<T>(p.dq, b, h, q, col) = from_float<T>(NAN);
    }
  }
}

// The same for keys: NaN in the written gradient (dk or dv) of those that a row with something broken in `source` (q or dout) attends to.
template <class T>
__device__ __noinline__ void mark_keys(const AttentionParams& p, const Matrix& source, const Matrix& target, int b, int kv_h, int kv_first,
                                       int count, int cols) {
  const Sizes& sizes = p.sizes;
  for (int i = threadIdx.x; i < count * cols; i += blockDim.x) {
    const int kv = kv_first + i / cols, col = i % cols;
    if (kv >= sizes.kv_len) continue;
    for (int h = kv_h * sizes.group; h < (kv_h + 1) * sizes.group; ++h) {
      for (int q = 0; q < sizes.q_len; ++q) {
        if (is_finite(*at<const T>(source, b, h, q, col)) || p.sum[row_number(sizes, b, h, q)] == 0.f) continue;
        if (row_interval(p.mask, b, q, sizes).contains(kv) && kept(p.mask, b, h, q, kv))
          *at<T>(target, b, kv_h, kv, col) = from_float<T>(NAN);
      }
    }
  }
}

template <class T, int kHeadSize, bool kModified>
__global__ void __launch_bounds__(Dq<T, kHeadSize, Pass::kDq>::kThreads, 1)
    attention_bwd_dq_kernel(const __grid_constant__ AttentionParams p) {
  using C = Dq<T, kHeadSize, Pass::kDq>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kStages = C::kShape.stages, kN = kBlockKv / 8;
  constexpr int kCols = kHeadSize / 8 / C::kShape.split;  // blocks of 8 columns that a warp accumulates
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const BlockPlace place((sizes.q_len + kBlockQ - 1) / kBlockQ, sizes.heads, true);
  const int b = place.b, h = place.h, kv_h = h / sizes.group, q_first = place.tile * kBlockQ;
  const int warp_row = threadIdx.x / 32 / C::kShape.split * 16, warp_col = threadIdx.x / 32 % C::kShape.split * kCols * 8;
  const Reach near = reach<kBlockQ>(p.mask, b, q_first, sizes);
  const Row rows[2] = {own_row(p.mask, b, q_first + warp_row, 0, sizes), own_row(p.mask, b, q_first + warp_row, 1, sizes)};
  const GradientRow gradient_rows[2] = {{p, b, h, rows[0].q}, {p, b, h, rows[1].q}};
  const bool has_dout = !kModified || p.dout.data != nullptr;

  const RowSource<T> k_rows{p.k, b, kv_h, near.low, near.high, sizes.head_dim}, v_rows{p.v, b, kv_h, near.low, near.high, sizes.value_dim};
  const typename C::QTile q_tile(shared), dout_tile(shared + C::QTile::kBytes);
  const auto stage = [&](int i) { return shared + 2 * C::QTile::kBytes + i * C::KvTile::kBytes; };
  const auto load_kv = [&](int i, int first) {
    typename C::KvTile(stage(2 * i)).template load<C::kThreads>(k_rows, first);
    if (has_dout) typename C::KvTile(stage(2 * i + 1)).template load<C::kThreads>(v_rows, first);
  };

  const Scorer<kModified> scorer(p.score);
  float acc[kCols][4] = {};
  bool broken = false;
  int first = next_tile(p.mask, b, h, place.tile, near.low / kBlockKv * kBlockKv, near.high, kBlockKv);
  q_tile.template load<C::kThreads>(RowSource<T>{p.q, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
  if (has_dout) dout_tile.template load<C::kThreads>(RowSource<T>{p.dout, b, h, 0, sizes.q_len, sizes.value_dim}, q_first);
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
    float s[kN][4], dp[kN][4] = {};
    multiply_transposed<T, kHeadSize>(s, q_tile, warp_row, k_tile);
    if (has_dout) multiply_transposed<T, kHeadSize>(dp, dout_tile, warp_row, v_tile);
    score_gradients<T>(s, dp, p, scorer, b, h, rows, gradient_rows, first, full, keep, 0);
    // 0 * NaN is NaN: a broken key must reach only rows that attend to it.
    if (!full && __syncthreads_or(k_tile.template has_broken<C::kThreads, false>())) {
      broken = true;
      k_tile.template has_broken<C::kThreads, true>();
      __syncthreads();
    }
    multiply_add<T, false>(acc, dp, k_tile, warp_col);
    __syncthreads();
    first = following;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kCols; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      // In a row without scores 0 * NaN of any key may have come up.
      const float x = gradient_rows[e / 2].inverse == 0.f ? 0.f : acc[n][e] * p.score.scale;
      *q_tile.at(rows[e / 2].q - q_first, warp_col + n * 8 + threadIdx.x % 4 * 2 + e % 2) = from_float<T>(x);
    }
  }
  __syncthreads();
  q_tile.template store<C::kThreads>(RowSource<T>{p.dq, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
  if (broken) {
    __syncthreads();
    mark_queries<T>(p, b, h, q_first, kBlockQ);
  }
}

template <class T, int kHeadSize>
struct Dkdv {
  static constexpr TileShape kShape = tile_shape(Pass::kDkdv, sizeof(T), kHeadSize);
  static constexpr int kThreads = kShape.kv / 16 * 32;
  using QTile = SharedTile<T, kShape.q, kHeadSize>;
  using KvTile = SharedTile<T, kShape.kv, kHeadSize>;
  static constexpr int kSharedBytes = 2 * KvTile::kBytes + 2 * kShape.stages * QTile::kBytes;
  // Whether both accumulators fit the registers; dk and dv come from two launches otherwise.
  static constexpr bool together(bool modified) { return kHeadSize <= 64 || (kHeadSize <= 128 && sizeof(T) == 2 && !modified); }
};

// The queries whose window can reach keys [first, end); intervals per row and keep may exclude more.
__device__ inline void query_range(const MaskParams& mask, int b, int first, int end, const Sizes& sizes, int& low, int& high) {
  const int64_t shift = query_shift(mask.alignment, b);
  low = mask.right >= 0 ? within(first - mask.right - shift, sizes.q_len) : 0;
  high = mask.left >= 0 ? within(end + mask.left - shift, sizes.q_len) : sizes.q_len;
}

template <class T, int kHeadSize, bool kModified, bool kDk, bool kDv>
__global__ void __launch_bounds__(Dkdv<T, kHeadSize>::kThreads, 1) attention_bwd_dkdv_kernel(const __grid_constant__ AttentionParams p) {
  using C = Dkdv<T, kHeadSize>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kStages = C::kShape.stages, kN = kBlockQ / 8, kCols = kHeadSize / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const BlockPlace place((sizes.kv_len + kBlockKv - 1) / kBlockKv, sizes.heads / sizes.group, false);
  const int b = place.b, kv_h = place.h, kv_first = place.tile * kBlockKv, kv_end = min(kv_first + kBlockKv, sizes.kv_len);
  const int warp_row = threadIdx.x / 32 * 16, kv_row = kv_first + warp_row + threadIdx.x % 32 / 4;
  const bool has_dout = !kModified || p.dout.data != nullptr;
  int low, high;
  query_range(p.mask, b, kv_first, kv_end, sizes, low, high);
  const int first_tile = low / kBlockQ, count = high > low ? (high + kBlockQ - 1) / kBlockQ - first_tile : 0;

  const typename C::KvTile k_tile(shared), v_tile(shared + C::KvTile::kBytes);
  const auto stage = [&](int i) { return shared + 2 * C::KvTile::kBytes + i * C::QTile::kBytes; };
  const auto head_of = [&](int i) { return kv_h * sizes.group + i / count; };
  const auto tile_of = [&](int i) { return first_tile + i % count; };
  // Steps are (query head of the group, query tile); those whose queries reach none of the keys are passed over.
  const auto next_step = [&](int i) {
    for (; i < sizes.group * count; ++i) {
      const Reach near = reach<kBlockQ>(p.mask, b, tile_of(i) * kBlockQ, sizes);
      if (near.low < kv_end && near.high > kv_first && tile_state(p.mask, b, head_of(i), tile_of(i), place.tile) != 0) break;
    }
    return i;
  };
  const auto load_q = [&](int s, int i) {
    const int h = head_of(i), q_first = tile_of(i) * kBlockQ;
    typename C::QTile(stage(2 * s)).template load<C::kThreads>(RowSource<T>{p.q, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
    if (has_dout)
      typename C::QTile(stage(2 * s + 1)).template load<C::kThreads>(RowSource<T>{p.dout, b, h, 0, sizes.q_len, sizes.value_dim}, q_first);
  };

  const Scorer<kModified> scorer(p.score);
  float dk[kDk ? kCols : 1][4] = {}, dv[kDv ? kCols : 1][4] = {};
  bool broken = false;
  k_tile.template load<C::kThreads>(RowSource<T>{p.k, b, kv_h, 0, sizes.kv_len, sizes.head_dim}, kv_first);
  v_tile.template load<C::kThreads>(RowSource<T>{p.v, b, kv_h, 0, sizes.kv_len, sizes.value_dim}, kv_first);
  const int end = sizes.group * count;
  int step = next_step(0);
  if (kStages > 1 && step < end) load_q(0, step);
  ptx::cp_async_commit();
  for (int i = 0; step < end; i = (i + 1) % kStages) {
    const int following = kStages > 1 ? next_step(step + 1) : end;  // one stage looks for it later, and keeps a register
    if (kStages == 1) load_q(0, step);
    else if (following < end) load_q((i + 1) % kStages, following);
    ptx::cp_async_commit();
    const int h = head_of(step), q_first = tile_of(step) * kBlockQ, own = q_first + threadIdx.x;
    ptx::cp_async_wait<kStages - 1>();
    const bool is_empty = threadIdx.x < kBlockQ && own < sizes.q_len && p.sum[row_number(sizes, b, h, own)] == 0.f;
    const bool any_empty = __syncthreads_or(is_empty);

    const typename C::QTile q_tile(stage(2 * i)), dout_tile(stage(2 * i + 1));
    const int keep = tile_state(p.mask, b, h, tile_of(step), place.tile);
    const bool full =
        keep == 2 && kv_first + kBlockKv <= sizes.kv_len && reach<kBlockQ>(p.mask, b, q_first, sizes).covers(kv_first, kv_end);
    if (any_empty) {
      // Rows without scores are zeros, whatever they hold: 0 * NaN is NaN, and they take part in the sums below.
#pragma unroll 1
      for (int n = threadIdx.x; n < kBlockQ * kHeadSize; n += C::kThreads) {
        const int row = n / kHeadSize;
        if (q_first + row < sizes.q_len && p.sum[row_number(sizes, b, h, q_first + row)] != 0.f) continue;
        *q_tile.at(row, n % kHeadSize) = from_float<T>(0.f);
        if (has_dout) *dout_tile.at(row, n % kHeadSize) = from_float<T>(0.f);
      }
      __syncthreads();
    }
    // Transposed, [keys, queries]: the accumulators' layout is that of the left operand of the products that follow.
    float s[kN][4], dp[kN][4] = {};
    multiply_transposed<T, kHeadSize>(s, k_tile, warp_row, q_tile);
    if (kDk && has_dout) multiply_transposed<T, kHeadSize>(dp, v_tile, warp_row, dout_tile);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int q = q_first + n * 8 + threadIdx.x % 4 * 2 + column;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          // Read for each of the two keys again: kept across the calls below, they cost float32 at head size 256 a spill.
          const Row row{q, row_interval(p.mask, b, q, sizes)};
          const GradientRow gradient_row(p, b, h, q);
          const int kv = kv_row + half * 8;
          const bool ok = q < sizes.q_len && kv < sizes.kv_len && allows(p.mask, b, h, row, kv, full, keep);
          bool stays = true;
          if (kModified && p.dropout.seed != nullptr && ok) stays = is_kept(p.dropout, dropout_words(p.dropout, b, h, q, kv), kv);
          pair_gradient<T>(s[n][half * 2 + column], dp[n][half * 2 + column], ok, stays, p, scorer, gradient_row, {b, h, q, kv}, 0);
        }
      }
    }
    // A broken query, or what is broken of its gradient, must reach only keys that it attends to.
    if (!full && __syncthreads_or(q_tile.template has_broken<C::kThreads, false>() ||
                                  (has_dout && dout_tile.template has_broken<C::kThreads, false>()))) {
      broken = true;
      q_tile.template has_broken<C::kThreads, true>();
      if (has_dout) dout_tile.template has_broken<C::kThreads, true>();
      __syncthreads();
    }
    // Gradients do not tell infinities from NaN; float32 at head size 256 has no register left to.
    if (kDv && has_dout) multiply_add<T, false>(dv, s, dout_tile);
    if (kDk) multiply_add<T, false>(dk, dp, q_tile);
    __syncthreads();
    step = kStages > 1 ? following : next_step(step + 1);
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  const int local = warp_row + threadIdx.x % 32 / 4;
#pragma unroll
  for (int n = 0; n < kCols; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = local + e / 2 * 8, col = n * 8 + threadIdx.x % 4 * 2 + e % 2;
      if constexpr (kDk) *k_tile.at(row, col) = from_float<T>(dk[n][e] * p.score.scale);
      if constexpr (kDv) *v_tile.at(row, col) = from_float<T>(dv[n][e]);
    }
  }
  __syncthreads();
  if (kDk) k_tile.template store<C::kThreads>(RowSource<T>{p.dk, b, kv_h, 0, sizes.kv_len, sizes.head_dim}, kv_first);
  if (kDv) v_tile.template store<C::kThreads>(RowSource<T>{p.dv, b, kv_h, 0, sizes.kv_len, sizes.value_dim}, kv_first);
  if (broken) {
    __syncthreads();
    if (kDk) mark_keys<T>(p, p.q, p.dk, b, kv_h, kv_first, kBlockKv, sizes.head_dim);
    if (kDv && has_dout) mark_keys<T>(p, p.dout, p.dv, b, kv_h, kv_first, kBlockKv, sizes.value_dim);
  }
}

}  // namespace fused_attn
