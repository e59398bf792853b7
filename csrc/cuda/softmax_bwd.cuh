// Masked softmax backward, dx = scale * p * (g - sum(p * g)), for logarithms scale * (g - p * sum(g)); and the gradient of a bias.
#pragma once

#include "cuda/softmax_row.cuh"

namespace fused_attn {

// A chunk of probabilities and of the gradients that reach them, both 0 where the query may not attend.
template <class T>
struct Incoming {
  static constexpr int kV = kVector<T>;
  float y[kV], g[kV];
  uint32_t allowed;  // bit j: whether the query may attend to key kv + j

  // Whether any allowed score is above -inf. Nothing depends on a row that has none; a uniform one has 1 / kv_len everywhere, so only the
  // scores themselves tell it from one whose scores are equal.
  __device__ __forceinline__ bool load(const SoftmaxParams& p, const SoftmaxRow& row, int kv) {
    RowView<const T>(p.result, row).load(y, kv, p.sizes.kv_len);
    RowView<const T>(p.dout, row).load(g, kv, p.sizes.kv_len);
    if (p.dropout.seed != nullptr) drop(g, p.dropout, row, kv);
    allowed = row.allowed<kV>(p, kv);
    bool alive = false;
    if (p.uniform_empty) {
      float scores[kV];
      load_scores<T>(scores, p, Scorer<true>(p.score), RowView<const T>(p.x, row), row, kv);
#pragma unroll
      for (int j = 0; j < kV; ++j) alive |= scores[j] != -INFINITY;
    }
#pragma unroll
    for (int j = 0; j < kV; ++j) {
      const bool depends = allowed >> j & 1;
      alive |= !p.uniform_empty && depends && y[j] != (p.log ? -INFINITY : 0.f);
      y[j] = !depends ? 0.f : p.log ? ptx::ex2(y[j] * kLog2e) : y[j];
      if (!depends) g[j] = 0.f;
    }
    return alive;
  }
};

__device__ __forceinline__ float score_gradient(bool log, float y, float g, float total) { return log ? g - y * total : y * (g - total); }

template <class T, class S>
__global__ void __launch_bounds__(S::kThreads, 1) softmax_bwd_kernel(const __grid_constant__ SoftmaxParams p) {
  constexpr int kV = kVector<T>, kStep = S::kLanes * kV, kKept = S::kChunks > 0 ? S::kChunks : 1;
  __shared__ float scratch[32];
  const int lane = threadIdx.x % S::kLanes, kv_len = p.sizes.kv_len;
  const SoftmaxRow row(p, static_cast<int64_t>(blockIdx.x) * S::kRows + threadIdx.x / S::kLanes);
  Incoming<T> chunks[kKept];
  float total = 0.f, alive = 0.f;
  const auto write = [&](const Incoming<T>& in, int kv) {
    float dx[kV];
#pragma unroll
    for (int j = 0; j < kV; ++j)
      dx[j] = in.allowed >> j & 1 && alive > 0.f ? score_gradient(p.log, in.y[j], in.g[j], total) * p.score.scale : 0.f;
    if (row.live && p.dx.data != nullptr) RowView<T>(p.dx, row).store(dx, kv, kv_len);
  };
  const auto add = [&](Incoming<T>& in, int kv) {
    if (in.load(p, row, kv)) alive = 1.f;
#pragma unroll
    for (int j = 0; j < kV; ++j) total += p.log ? in.g[j] : in.y[j] * in.g[j];
  };
  if constexpr (S::kChunks > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) add(chunks[i], i * kStep + lane * kV);
  } else {
    for (int kv = lane * kV; kv < kv_len; kv += kStep) add(chunks[0], kv);
  }
  total = reduce<Sum, S::kLanes>(total, scratch), alive = reduce<Max, S::kLanes>(alive, scratch);
  if (p.totals != nullptr && row.live && lane == 0) {
    p.totals[row.r] = total;
    p.totals[static_cast<int64_t>(p.sizes.batch) * p.sizes.heads * p.sizes.q_len + row.r] = alive;
  }
  if constexpr (S::kChunks > 0) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) write(chunks[i], i * kStep + lane * kV);
  } else {
    for (int kv = lane * kV; kv < kv_len; kv += kStep) {
      chunks[0].load(p, row, kv);
      write(chunks[0], kv);
    }
  }
}

constexpr int kBiasColumns = 32,
              kBiasRows = 8;  // a block of the bias kernel: neighbouring columns, and rows that are added up side by side

// dbias[split, own row, kv]: score gradients of the rows that share a row of the bias, in a fixed order.
template <class T>
__global__ void __launch_bounds__(kBiasColumns* kBiasRows) softmax_bwd_bias_kernel(const __grid_constant__ SoftmaxParams p) {
  __shared__ float sums[kBiasRows][kBiasColumns];
  const Sizes &sizes = p.sizes, &own = p.bias;
  const int chunks = (sizes.kv_len + kBiasColumns - 1) / kBiasColumns, own_rows = own.batch * own.heads * own.q_len;
  const int over_q = sizes.q_len / own.q_len, over_heads = sizes.heads / own.heads, members = sizes.batch / own.batch * over_heads * over_q;
  const int column = threadIdx.x % kBiasColumns, lane = threadIdx.x / kBiasColumns, kv = blockIdx.x % chunks * kBiasColumns + column;
  const int rest = blockIdx.x / chunks, mine = rest % own_rows, split = rest / own_rows;
  float total = 0.f;
  for (int n = split * kBiasRows + lane; n < members; n += p.bias_splits * kBiasRows) {
    const int q = mine % own.q_len + n % over_q, h = mine / own.q_len % own.heads + n / over_q % over_heads;
    const int b = mine / own.q_len / own.heads + n / over_q / over_heads;
    const SoftmaxRow row(p, (static_cast<int64_t>(b) * sizes.heads + h) * sizes.q_len + q);
    if (kv >= sizes.kv_len) continue;
    float y = to_float(*at<const T>(p.result, b, h, q, kv)), g = to_float(*at<const T>(p.dout, b, h, q, kv));
    if (p.dropout.seed != nullptr) g *= is_kept(p.dropout, dropout_words(p.dropout, b, h, q, kv), kv) ? p.dropout.factor : 0.f;
    if (!row.allows(p, kv) || p.totals[static_cast<int64_t>(sizes.batch) * sizes.heads * sizes.q_len + row.r] == 0.f) continue;
    if (p.log) y = ptx::ex2(y * kLog2e);
    total += score_gradient(p.log, y, g, p.totals[row.r]);
  }
  sums[lane][column] = total;
  __syncthreads();
  if (lane != 0 || kv >= sizes.kv_len) return;
  for (int i = 1; i < kBiasRows; ++i) total += sums[i][column];
  p.dbias[static_cast<int64_t>(rest) * sizes.kv_len + kv] = total;
}

}  // namespace fused_attn
