// Starting a kernel within the rules of every chip for threads, blocks and shared memory.
#pragma once

#include <cuda_runtime.h>

#include "fused_attn/launch.h"

namespace fused_attn {

// kernel<<<blocks, kThreads, kSharedBytes, stream>>>(params); nothing for zero blocks, an error beyond the 2^31 - 1 that a grid has room
// for. A kernel without the attribute has 48 KB of shared memory, what it declares itself included: one that is given any here declares
// nothing but `extern __shared__`, so that kSharedBytes is all of it.
template <int kThreads, int kSharedBytes = 0, class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t blocks, cudaStream_t stream) {
  static_assert(kThreads <= 1024 && kThreads % 32 == 0);
  static_assert(kSharedBytes <= kMaxSharedBytes, "the smallest chip gives a block no more");
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if constexpr (kSharedBytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream>>>(params);
  return cudaGetLastError();
}

inline int64_t tiles(int length, int block) { return (static_cast<int64_t>(length) + block - 1) / block; }

}  // namespace fused_attn
