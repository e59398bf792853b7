// Sums and maxima over the lanes that share a row: 2 to 32 neighbours of a warp, or a whole block. Every lane gets the result.
#pragma once

#include <cmath>

namespace fused_attn {

struct Sum {
  static constexpr float kNothing = 0.f;
  __device__ static float join(float x, float y) { return x + y; }
};

struct Max {
  static constexpr float kNothing = -INFINITY;
  __device__ static float join(float x, float y) { return fmaxf(x, y); }
};

// kLanes <= 32 within a warp, otherwise kLanes == blockDim.x; `scratch` holds one float per warp of the block.
template <class Op, int kLanes>
__device__ __forceinline__ float reduce(float x, float* scratch) {
#pragma unroll
  for (int offset = (kLanes < 32 ? kLanes : 32) / 2; offset > 0; offset /= 2) x = Op::join(x, __shfl_xor_sync(~0u, x, offset));
  if constexpr (kLanes > 32) {
    constexpr int kWarps = kLanes / 32;
    __syncthreads();  // the scratch may still be read for the reduction before
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < kWarps ? scratch[threadIdx.x % 32] : Op::kNothing;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) x = Op::join(x, __shfl_xor_sync(~0u, x, offset));
  }
  return x;
}

}  // namespace fused_attn
