// Every attention pass for one element type and padded head size; attention.cu defines and instantiates them, dispatch.cu chooses.
#pragma once

#include "cuda/configs.h"
#include "fused_attn/launch.h"
#include "fused_attn/tensor.cuh"

namespace fused_attn {

template <class T, int kHeadSize>
struct Passes {
  static cudaError_t fwd(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t rows(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t columns(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t bwd_delta(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t bwd_dq(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t bwd_dkdv(const AttentionParams& p, cudaStream_t stream);
  static cudaError_t bwd_bias(const AttentionParams& p, cudaStream_t stream);
};

}  // namespace fused_attn
