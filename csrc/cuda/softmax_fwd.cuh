// Masked softmax forward: rows that fit the registers of their lanes are read once, longer ones twice (online statistics, arXiv
// 1805.02867).
#pragma once

#include "cuda/softmax_row.cuh"

namespace fused_attn {

// Scores to the result, written; with dropout the probabilities before it are written too. base, sum: the row's maximum (0 where the row is
// empty) and its sum of exponentials.
template <class T>
__device__ __forceinline__ void finish(float (&x)[kVector<T>], const SoftmaxParams& p, const Scorer<true>& scorer, const SoftmaxRow& row,
                                       int kv, float base, float sum) {
  const bool empty = sum == 0.f;
  // In a row that holds a NaN even what is masked would come out as one.
  const uint32_t allowed = isnan(sum) ? row.allowed<kVector<T>>(p, kv) : ~0u;
  const float inverse = 1.f / (empty ? 1.f : sum), log_sum = empty ? 0.f : logf(sum), log_len = logf(static_cast<float>(p.sizes.kv_len));
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) {
    if (p.log) x[j] = empty && p.uniform_empty ? -log_len : scorer.natural(x[j] - base) - log_sum;
    else x[j] = empty && p.uniform_empty ? 1.f / p.sizes.kv_len : scorer.exponential(x[j], base) * inverse;
    if (!(allowed >> j & 1)) x[j] = p.log ? -INFINITY : 0.f;
  }
  if (!row.live) return;
  if (p.dropout.seed != nullptr) {
    RowView<T>(p.probs, row).store(x, kv, p.sizes.kv_len);
    drop(x, p.dropout, row, kv);
  }
  RowView<T>(p.out, row).store(x, kv, p.sizes.kv_len);
}

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) softmax_fwd_kernel(const __grid_constant__ SoftmaxParams p) {
  constexpr int kV = kVector<T>, kStep = S::kLanes * kV;
  __shared__ float scratch[32];
  const int lane = threadIdx.x % S::kLanes, kv_len = p.sizes.kv_len;
  const SoftmaxRow row(p, static_cast<int64_t>(blockIdx.x) * S::kRows + threadIdx.x / S::kLanes);
  const RowView<const T> view(p.x, row);
  const Scorer<true> scorer(p.score);
  if constexpr (S::kChunks > 0) {
    float x[S::kChunks][kV], top = -INFINITY, sum = 0.f;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
      load_scores<T>(x[i], p, scorer, view, row, i * kStep + lane * kV);
#pragma unroll
      for (int j = 0; j < kV; ++j) top = fmaxf(top, x[i][j]);
    }
    top = reduce<Max, S::kLanes>(top, scratch);
    const float base = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kV; ++j) sum += scorer.exponential(x[i][j], base);
    }
    sum = reduce<Sum, S::kLanes>(sum, scratch);
#pragma unroll
    for (int i = 0; i < S::kChunks; ++i) finish<T>(x[i], p, scorer, row, i * kStep + lane * kV, base, sum);
  } else {
    RowState state;
    for (int kv = lane * kV; kv < kv_len; kv += kStep) {
      float x[kV], higher = state.top;
      load_scores<T>(x, p, scorer, view, row, kv);
#pragma unroll
      for (int j = 0; j < kV; ++j) higher = fmaxf(higher, x[j]);
      const float before = state.top;
      state.top = higher;
      state.sum *= scorer.exponential(before, state.base());
#pragma unroll
      for (int j = 0; j < kV; ++j) state.sum += scorer.exponential(x[j], state.base());
    }
    const float top = reduce<Max, S::kLanes>(state.top, scratch), base = top == -INFINITY ? 0.f : top;
    const float sum = reduce<Sum, S::kLanes>(state.sum * scorer.exponential(state.top, base), scratch);
    for (int kv = lane * kV; kv < kv_len; kv += kStep) {
      float x[kV];
      load_scores<T>(x, p, scorer, view, row, kv);
      finish<T>(x, p, scorer, row, kv, base, sum);
    }
  }
}

}  // namespace fused_attn
