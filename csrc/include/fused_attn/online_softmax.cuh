// Row statistics of a softmax whose scores arrive tile by tile (arXiv 1805.02867), for accumulator tiles of mma.m16n8: a thread holds
// two rows (g and g + 8), four neighbouring lanes share a row.
#pragma once

#include "fused_attn/ptx/ex2.cuh"
#include "fused_attn/score_mod.cuh"

namespace fused_attn {

constexpr float kLog2e = 1.44269504088896f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// From a product q k to a score and to exp(score - top). kModified: modifications, sinks, any scale; otherwise the score stays a product.
template <bool kModified>
struct Scorer {
  const ScoreParams& params;
  float factor;  // from a score to the exponent of 2

  __device__ explicit Scorer(const ScoreParams& p) : params(p), factor(is_raw() ? p.scale * kLog2e : kLog2e) {}

  __device__ bool is_raw() const { return !kModified || params.raw; }

  __device__ float score(float product, Place place) const {
    return is_raw() ? product : apply(params, product * params.scale, place, params.count);
  }

  // Scores may be huge and equal: the exact difference comes first. One fused multiply-add instead would leave the rounding of
  // top * factor, 2^-24 of the largest logit, in every exponent.
  __device__ float exponential(float score, float top) const { return ptx::ex2((score - top) * factor); }

  // A score in natural units.
  __device__ float natural(float score) const { return is_raw() ? score * params.scale : score; }
};

struct RowState {
  float top = -INFINITY, sum = 0.f;

  // The maximum to subtract; rows without keys so far have none.
  __device__ float base() const { return top == -INFINITY ? 0.f : top; }
};

}  // namespace fused_attn
