// Starting a kernel with more dynamic shared memory than the default 48 KB.
#pragma once

#include <cuda_runtime.h>

#include "fused_attn/launch.h"

namespace fused_attn {

// kernel<<<blocks, threads, bytes, stream>>>(params); nothing for zero blocks, an error beyond the 2^31 - 1 that a grid has room for.
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Params& params, int64_t blocks, int threads, int bytes, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(params);
  return cudaGetLastError();
}

inline int64_t tiles(int length, int block) { return (static_cast<int64_t>(length) + block - 1) / block; }

}  // namespace fused_attn
