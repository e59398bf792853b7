// The masked softmax: how the rows of a call are spread over lanes, and the launches.
#include "cuda/launch.cuh"
#include "cuda/softmax_bwd.cuh"
#include "cuda/softmax_fwd.cuh"

namespace fused_attn {

namespace {

int64_t rows_of(const SoftmaxParams& p) { return static_cast<int64_t>(p.sizes.batch) * p.sizes.heads * p.sizes.q_len; }

// run(Spread) for the row length, in chunks of 16 bytes: a few lanes for short rows, a warp up to 1024 elements, a block beyond; rows up to
// 32 elements per lane stay in registers (twice that many values live in backward), longer ones are read twice.
template <class T, class Run>
cudaError_t by_length(int kv_len, const Run& run) {
  constexpr int kV = kVector<T>;
  if (kv_len <= 64) return run(Spread<8, 8 / kV>());
  if (kv_len <= 256) return run(Spread<32, 8 / kV>());
  if (kv_len <= 1024) return run(Spread<32, 32 / kV>());
  if (kv_len <= 4096) return run(Spread<128, 32 / kV>());
  if (kv_len <= 16384) return run(Spread<512, 32 / kV>());
  return run(Spread<512, 0>());
}

template <class T>
cudaError_t forward(const SoftmaxParams& p, cudaStream_t stream) {
  return by_length<T>(p.sizes.kv_len, [&](auto spread) {
    using S = decltype(spread);
    return launch<S::kThreads>(softmax_fwd_kernel<T, S>, p, (rows_of(p) + S::kRows - 1) / S::kRows, stream);
  });
}

template <class T>
cudaError_t backward(const SoftmaxParams& p, cudaStream_t stream) {
  const cudaError_t error = by_length<T>(p.sizes.kv_len, [&](auto spread) {
    using S = decltype(spread);
    return launch<S::kThreads>(softmax_bwd_kernel<T, S>, p, (rows_of(p) + S::kRows - 1) / S::kRows, stream);
  });
  if (error != cudaSuccess || p.dbias == nullptr) return error;
  const int64_t blocks = tiles(p.sizes.kv_len, kBiasColumns) * p.bias.batch * p.bias.heads * p.bias.q_len * p.bias_splits;
  return launch<kBiasColumns * kBiasRows>(softmax_bwd_bias_kernel<T>, p, blocks, stream);
}

}  // namespace

cudaError_t softmax_fwd(const SoftmaxParams& p, DType dtype, cudaStream_t stream) {
  if (rows_of(p) == 0 || p.sizes.kv_len == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kHalf: return forward<half>(p, stream);
    case DType::kBFloat16: return forward<bfloat16>(p, stream);
    default: return forward<float>(p, stream);
  }
}

cudaError_t softmax_bwd(const SoftmaxParams& p, DType dtype, cudaStream_t stream) {
  if (rows_of(p) == 0 || p.sizes.kv_len == 0) return cudaSuccess;
  switch (dtype) {
    case DType::kHalf: return backward<half>(p, stream);
    case DType::kBFloat16: return backward<bfloat16>(p, stream);
    default: return backward<float>(p, stream);
  }
}

}  // namespace fused_attn
