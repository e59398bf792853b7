// Gradient of a bias: score gradients before modification `place`, added up over what the bias broadcasts along. A block owns one tile of
// the bias and walks over the batches and heads that share it; where the bias has no queries (or no keys) it walks over their tiles
// instead.
#pragma once

#include "cuda/attention_bwd_sm80.cuh"

namespace fused_attn {

// Sum of a column of [16, kN * 8] over the warp's 16 rows; lanes 0 to 3 hold the results of columns 2t and 2t + 1 of each block of 8.
__device__ __forceinline__ float column_sum(float x) {
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

template <class T, int kHeadSize>
__global__ void __launch_bounds__(Dq<T, kHeadSize, Pass::kBias>::kThreads, 1)
    attention_bwd_bias_kernel(const __grid_constant__ AttentionParams p) {
  using C = Dq<T, kHeadSize, Pass::kBias>;
  constexpr int kBlockQ = C::kShape.q, kBlockKv = C::kShape.kv, kN = kBlockKv / 8, kWarps = C::kThreads / 32;
  extern __shared__ __align__(128) unsigned char shared[];
  const Sizes& sizes = p.sizes;
  const int q_tiles = (sizes.q_len + kBlockQ - 1) / kBlockQ, kv_tiles = (sizes.kv_len + kBlockKv - 1) / kBlockKv;
  const int own_q = p.over_q ? 1 : q_tiles, own_kv = p.over_kv ? 1 : kv_tiles, own_heads = sizes.heads / p.over_heads;
  const int rest = blockIdx.x / own_q, b_own = rest / own_kv / own_heads * p.over_batch, h_own = rest / own_kv % own_heads * p.over_heads;
  const int steps_q = q_tiles / own_q, steps_kv = kv_tiles / own_kv, warp_row = threadIdx.x / 32 * 16;
  const typename C::QTile q_tile(shared), dout_tile(shared + C::QTile::kBytes);
  const typename C::KvTile k_tile(shared + 2 * C::QTile::kBytes), v_tile(shared + 2 * C::QTile::kBytes + C::KvTile::kBytes);
  const bool has_dout = p.dout.data != nullptr;
  const Scorer<true> scorer(p.score);
  float total[kN][4] = {};
  for (int step = 0; step < steps_q * steps_kv * p.over_batch * p.over_heads; ++step) {
    const int outer = step / (steps_q * steps_kv), h = h_own + outer % p.over_heads, b = b_own + outer / p.over_heads;
    const int q_number = blockIdx.x % own_q + step % steps_q, kv_number = rest % own_kv + step / steps_q % steps_kv;
    const int q_first = q_number * kBlockQ, kv_first = kv_number * kBlockKv, kv_h = h / sizes.group;
    const Reach near = reach<kBlockQ>(p.mask, b, q_first, sizes);
    const int keep = tile_state(p.mask, b, h, q_number, kv_number);
    if (near.low >= kv_first + kBlockKv || near.high <= kv_first || keep == 0) continue;
    __syncthreads();
    q_tile.template load<C::kThreads>(RowSource<T>{p.q, b, h, 0, sizes.q_len, sizes.head_dim}, q_first);
    k_tile.template load<C::kThreads>(RowSource<T>{p.k, b, kv_h, near.low, near.high, sizes.head_dim}, kv_first);
    if (has_dout) {
      dout_tile.template load<C::kThreads>(RowSource<T>{p.dout, b, h, 0, sizes.q_len, sizes.value_dim}, q_first);
      v_tile.template load<C::kThreads>(RowSource<T>{p.v, b, kv_h, near.low, near.high, sizes.value_dim}, kv_first);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    const Row rows[2] = {own_row(p.mask, b, q_first + warp_row, 0, sizes), own_row(p.mask, b, q_first + warp_row, 1, sizes)};
    const GradientRow gradient_rows[2] = {{p, b, h, rows[0].q}, {p, b, h, rows[1].q}};
    float s[kN][4], dp[kN][4] = {};
    multiply_transposed<T, kHeadSize>(s, q_tile, warp_row, k_tile);
    if (has_dout) multiply_transposed<T, kHeadSize>(dp, dout_tile, warp_row, v_tile);
    score_gradients<T>(s, dp, p, scorer, b, h, rows, gradient_rows, kv_first, false, keep, p.place);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) total[n][e] += dp[n][e];
    }
  }

  const int q_first = blockIdx.x % own_q * kBlockQ, kv_first = rest % own_kv * kBlockKv;
  // Indices of dbias: a dimension that is shared has one element.
  const int b = b_own / p.over_batch, h = h_own / p.over_heads, row = q_first + warp_row + threadIdx.x % 32 / 4;
  float row_sums[2] = {};
  // Every warp's column sums [kWarps, kBlockKv], where the tiles were.
  float* const sums = reinterpret_cast<float*>(shared);
  static_assert(kWarps * kBlockKv * sizeof(float) <= C::kSharedBytes);
  if (p.over_q) __syncthreads();
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int q = row + e / 2 * 8, local = n * 8 + threadIdx.x % 4 * 2 + e % 2, kv = kv_first + local;
      if (p.over_kv) row_sums[e / 2] += total[n][e];
      else if (!p.over_q && q < sizes.q_len && kv < sizes.kv_len) store(p.dbias, p.dbias_dtype, b, h, q, kv, total[n][e]);
      if (p.over_q && e < 2) {
        const float sum = column_sum(total[n][e] + total[n][e + 2]);
        if (threadIdx.x % 32 < 4) sums[threadIdx.x / 32 * kBlockKv + local] = sum;
      }
    }
  }
  if (p.over_kv) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum = quad_sum(row_sums[half]);
      if (threadIdx.x % 4 == 0 && row + half * 8 < sizes.q_len) store(p.dbias, p.dbias_dtype, b, h, row + half * 8, 0, sum);
    }
  } else if (p.over_q) {
    __syncthreads();
    for (int i = threadIdx.x; i < kBlockKv && kv_first + i < sizes.kv_len; i += C::kThreads) {
      float sum = 0.f;
      for (int w = 0; w < kWarps; ++w) sum += sums[w * kBlockKv + i];
      store(p.dbias, p.dbias_dtype, b, h, 0, kv_first + i, sum);
    }
  }
}

}  // namespace fused_attn
