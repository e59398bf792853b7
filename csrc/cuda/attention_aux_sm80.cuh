// What attention gives out besides its output, in passes of their own, so that asking for it cannot change the output: `rows` walks over
// the keys of a query tile (probabilities, scores, maximum, entropy), `columns` over the queries of a key tile.
#pragma once

#include "cuda/attention_tile.cuh"
#include "cuda/configs.h"

namespace fused_attn {

// Statistics of a finished row: the maximum to subtract and 1 / sum, 0 for rows without keys.
struct RowStatistics {
  float top = 0.f, inverse = 0.f;

  __device__ RowStatistics(const AttentionParams& p, int b, int h, int q) {
    if (q >= p.sizes.q_len) return;
    const int64_t r = row_number(p.sizes, b, h, q);
    const float sum = p.sum[r];
    if (p.top[r] != -INFINITY) top = p.top[r];
    if (sum != 0.f) inverse = 1.f / sum;
  }
};

template <class T, int kHeadSize>
struct Rows {
  static constexpr TileShape kShape = tile_shape(Pass::kRows, sizeof(T), kHeadSize);
  static constexpr int kThreads = kShape.q / 16 * 32;
  using QTile = SharedTile<T, kShape.q, kHeadSize>;
  using KvTile = SharedTile<T, kShape.kv, kHeadSize>;
  static constexpr int kSharedBytes = QTile::kBytes + kShape.stages * KvTile::kBytes;
};

// Four words of each of four neighbouring lanes, transposed: word i of lane t goes to word t of lane i.
__device__ __forceinline__ void quad_transpose(uint32_t (&w)[4]) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = threadIdx.x & bit;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i & bit) continue;
      const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i | bit], bit);
      if (upper) w[i] = got;
      else w[i | bit] = got;
    }
  }
}

// Writes a warp's rows of a tile, probabilities or scores [16, kN * 8], to [batch, heads, q_len, kv_len]: full sectors of 32 bytes where
// the rows of the result are aligned, which needs 8 columns of 16 bits side by side in one lane.
template <class T, int kN>
__device__ __forceinline__ void store_rows(const float (&s)[kN][4], const Matrix& to, const Sizes& sizes, int b, int h,
                                           const Row (&rows)[2], int first) {
  const int t = threadIdx.x % 4;
  const bool vectors = sizes.kv_len % 8 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int q = rows[half].q;
    T* row = at<T>(to, b, h, q, 0);
#pragma unroll
    for (int n = 0; n < kN; n += 4) {
      uint32_t words[4] = {};
      if constexpr (sizeof(T) == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) words[i] = pack<T>(s[n + i][half * 2], s[n + i][half * 2 + 1]);
        if (vectors) quad_transpose(words);
      }
      if (q >= sizes.q_len) continue;
      if (vectors && sizeof(T) == 2) {
        const int kv = first + (n + t) * 8;
        if (kv < sizes.kv_len) __stwb(reinterpret_cast<uint4*>(row + kv), make_uint4(words[0], words[1], words[2], words[3]));
        continue;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int kv = first + (n + i) * 8 + t * 2;
        const float x = s[n + i][half * 2], y = s[n + i][half * 2 + 1];
        if (vectors) {
          if (kv < sizes.kv_len) __stwb(reinterpret_cast<float2*>(row + kv), make_float2(x, y));
        } else {
          if (kv < sizes.kv_len) row[kv] = from_float<T>(x);
          if (kv + 1 < sizes.kv_len) row[kv + 1] = from_float<T>(y);
        }
      }
    }
  }
}

// In 16 bits four blocks a multiprocessor: left alone, the choice of the scores' dtype takes 3 registers too many for that.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(Rows<T, kHeadSize>::kThreads, sizeof(T) == 2 ? 4 : 1)
    attention_rows_kernel(const __grid_constant__ AttentionParams p) {
  using C = Rows<T, kHeadSize>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kStages = C::kShape.stages, kN = kBlockKv / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const BlockPlace place((sizes.q_len + kBlockQ - 1) / kBlockQ, sizes.heads, false);
  const int b = place.b, h = place.h, q_first = place.tile * kBlockQ, warp_row = threadIdx.x / 32 * 16;
  const Reach near = reach<kBlockQ>(p.mask, b, q_first, sizes);
  const Row rows[2] = {own_row(p.mask, b, q_first + warp_row, 0, sizes), own_row(p.mask, b, q_first + warp_row, 1, sizes)};
  const RowStatistics statistics[2] = {{p, b, h, rows[0].q}, {p, b, h, rows[1].q}};
  const RowSource<T> k_rows{p.k, b, h / sizes.group, near.low, near.high, sizes.head_dim};
  const typename C::QTile q_tile(shared);
  const auto k_tile = [&](int i) { return typename C::KvTile(shared + C::QTile::kBytes + i * C::KvTile::kBytes); };

  const Scorer<true> scorer(p.score);
  float top[2] = {-INFINITY, -INFINITY}, entropy[2] = {}, broken[2] = {};
  q_tile.template load<C::kThreads>(RowSource<T>{p.q, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
  if (kStages > 1) k_tile(0).template load<C::kThreads>(k_rows, 0);
  ptx::cp_async_commit();
  for (int first = 0, i = 0; first < sizes.kv_len; first += kBlockKv, i = (i + 1) % kStages) {
    if (kStages == 1) k_tile(0).template load<C::kThreads>(k_rows, first);
    else if (first + kBlockKv < sizes.kv_len) k_tile((i + 1) % kStages).template load<C::kThreads>(k_rows, first + kBlockKv);
    ptx::cp_async_commit();
    ptx::cp_async_wait<kStages - 1>();
    __syncthreads();
    const int keep = tile_state(p.mask, b, h, place.tile, first / kBlockKv);
    float s[kN][4];
    if (keep != 0 && first < near.high && first + kBlockKv > near.low) {
      multiply_transposed<T, kHeadSize>(s, q_tile, warp_row, k_tile(i));
      to_scores<true>(s, p, scorer, b, h, rows, first, keep == 2 && near.covers(first, first + kBlockKv), keep);
    } else {
#pragma unroll
      for (int n = 0; n < kN; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = -INFINITY;
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        top[half] = fmaxf(top[half], s[n][e]);
        if (isnan(s[n][e])) broken[half] = 1.f;  // the maximum loses it
        float probability = scorer.exponential(s[n][e], statistics[half].top) * statistics[half].inverse;
        // In a row that attended to a NaN even exp(-inf) * inverse is one.
        if (isnan(probability) && !allows(p.mask, b, h, rows[half], first + n * 8 + threadIdx.x % 4 * 2 + e % 2, false, keep))
          probability = 0.f;
        if (p.entropy != nullptr) entropy[half] -= probability > 0.f ? probability * logf(probability) : probability;
        if (p.scores.data == nullptr) s[n][e] = probability;
        else s[n][e] = scorer.natural(s[n][e]);
      }
    }
    if (p.scores.data != nullptr) {
      switch (p.scores_dtype) {
        case DType::kHalf: store_rows<__half>(s, p.scores, sizes, b, h, rows, first); break;
        case DType::kBFloat16: store_rows<bfloat16>(s, p.scores, sizes, b, h, rows, first); break;
        default: store_rows<float>(s, p.scores, sizes, b, h, rows, first);
      }
    } else if (p.probs.data != nullptr) store_rows<T>(s, p.probs, sizes, b, h, rows, first);
    __syncthreads();
  }
  ptx::cp_async_wait<0>();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    top[half] = quad_max(top[half]), entropy[half] = quad_sum(entropy[half]), broken[half] = quad_max(broken[half]);
    if (threadIdx.x % 4 != 0 || rows[half].q >= sizes.q_len) continue;
    const int64_t r = row_number(sizes, b, h, rows[half].q);
    if (p.max_scores != nullptr) p.max_scores[r] = broken[half] > 0.f ? NAN : scorer.natural(top[half]);
    if (p.entropy != nullptr) p.entropy[r] = entropy[half];
  }
}

template <class T, int kHeadSize>
struct Columns {
  static constexpr TileShape kShape = tile_shape(Pass::kColumns, sizeof(T), kHeadSize);
  static constexpr int kThreads = kShape.kv / 16 * 32;
  using QTile = SharedTile<T, kShape.q, kHeadSize>;
  using KTile = SharedTile<T, kShape.kv, kHeadSize>;
  static constexpr int kSharedBytes = KTile::kBytes + QTile::kBytes;
};

// column_sums[b, h, kv]: probabilities summed over the queries, by one block per tile of keys.
template <class T, int kHeadSize>
__global__ void __launch_bounds__(Columns<T, kHeadSize>::kThreads, 1) attention_columns_kernel(const __grid_constant__ AttentionParams p) {
  using C = Columns<T, kHeadSize>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kN = kBlockQ / 8;
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const BlockPlace place((sizes.kv_len + kBlockKv - 1) / kBlockKv, sizes.heads, false);
  const int b = place.b, h = place.h, kv_first = place.tile * kBlockKv, warp_row = threadIdx.x / 32 * 16;
  const typename C::KTile k_tile(shared);
  const typename C::QTile q_tile(shared + C::KTile::kBytes);
  const Scorer<true> scorer(p.score);
  float total[2] = {};
  k_tile.template load<C::kThreads>(RowSource<T>{p.k, b, h / sizes.group, 0, sizes.kv_len, sizes.head_dim}, kv_first);
  for (int q_first = 0; q_first < sizes.q_len; q_first += kBlockQ) {
    const Reach near = reach<kBlockQ>(p.mask, b, q_first, sizes);
    const int keep = tile_state(p.mask, b, h, q_first / kBlockQ, place.tile);
    if (near.low >= kv_first + kBlockKv || near.high <= kv_first || keep == 0) continue;
    q_tile.template load<C::kThreads>(RowSource<T>{p.q, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float s[kN][4];
    multiply_transposed<T, kHeadSize>(s, k_tile, warp_row, q_tile);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int q = q_first + n * 8 + threadIdx.x % 4 * 2 + column;
        const RowStatistics row(p, b, h, q);
        const Row queries{q, row_interval(p.mask, b, q, sizes)};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int kv = kv_first + warp_row + threadIdx.x % 32 / 4 + half * 8;
          if (!allows(p.mask, b, h, queries, kv, false, keep)) continue;
          const float score = scorer.score(s[n][half * 2 + column], {b, h, q, kv});
          total[half] += scorer.exponential(score, row.top) * row.inverse;
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    total[half] = quad_sum(total[half]);
    const int kv = kv_first + warp_row + threadIdx.x % 32 / 4 + half * 8;
    if (threadIdx.x % 4 == 0 && kv < sizes.kv_len)
      p.column_sums[(static_cast<int64_t>(b) * sizes.heads + h) * sizes.kv_len + kv] = total[half];
  }
}

}  // namespace fused_attn
