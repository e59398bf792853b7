// The attention passes for one element type and head size, given on the compiler's command line so that the combinations compile in
// parallel.
#include "cuda/attention_bwd_bias_sm80.cuh"
#include "cuda/attention_fwd_sm80.cuh"
#include "cuda/launch.cuh"
#include "cuda/passes.h"

namespace fused_attn {

namespace {

// Whether a call needs the kernel that knows modifications, sinks, dropout and further gradients; the other one is faster to the eye of
// the register allocator and takes only products with a positive scale.
bool is_modified(const AttentionParams& p) {
  return !p.score.raw || p.dropout.seed != nullptr || p.dprobs.data != nullptr || p.dscores.data != nullptr;
}

int64_t batch_heads(const Sizes& sizes) { return static_cast<int64_t>(sizes.batch) * sizes.heads; }

template <class T, int kHeadSize, bool kModified>
cudaError_t dkdv(const AttentionParams& p, int64_t blocks, cudaStream_t stream) {
  using C = Dkdv<T, kHeadSize>;
  const auto run = [&](auto kernel) { return launch<C::kThreads, C::kSharedBytes>(kernel, p, blocks, stream); };
  if constexpr (C::together(kModified)) {
    return run(attention_bwd_dkdv_kernel<T, kHeadSize, kModified, true, true>);
  } else {
    const cudaError_t error = run(attention_bwd_dkdv_kernel<T, kHeadSize, kModified, true, false>);
    return error == cudaSuccess ? run(attention_bwd_dkdv_kernel<T, kHeadSize, kModified, false, true>) : error;
  }
}

}  // namespace

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::fwd(const AttentionParams& p, cudaStream_t stream) {
  using C = Fwd<T, kHeadSize>;
  const auto kernel = is_modified(p) ? attention_fwd_kernel<T, kHeadSize, true> : attention_fwd_kernel<T, kHeadSize, false>;
  return launch<C::kThreads, C::kSharedBytes>(kernel, p, tiles(p.sizes.q_len, C::kShape.q) * batch_heads(p.sizes), stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::rows(const AttentionParams& p, cudaStream_t stream) {
  using C = Rows<T, kHeadSize>;
  const int64_t blocks = tiles(p.sizes.q_len, C::kShape.q) * batch_heads(p.sizes);
  return launch<C::kThreads, C::kSharedBytes>(attention_rows_kernel<T, kHeadSize>, p, blocks, stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::columns(const AttentionParams& p, cudaStream_t stream) {
  using C = Columns<T, kHeadSize>;
  const int64_t blocks = tiles(p.sizes.kv_len, C::kShape.kv) * batch_heads(p.sizes);
  return launch<C::kThreads, C::kSharedBytes>(attention_columns_kernel<T, kHeadSize>, p, blocks, stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::bwd_delta(const AttentionParams& p, cudaStream_t stream) {
  const int64_t blocks = (batch_heads(p.sizes) * p.sizes.q_len + 3) / 4;
  return launch<128>(attention_bwd_delta_kernel<T>, p, blocks, stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::bwd_dq(const AttentionParams& p, cudaStream_t stream) {
  using C = Dq<T, kHeadSize, Pass::kDq>;
  const bool modified = is_modified(p) || p.dout.data == nullptr;
  const auto kernel = modified ? attention_bwd_dq_kernel<T, kHeadSize, true> : attention_bwd_dq_kernel<T, kHeadSize, false>;
  return launch<C::kThreads, C::kSharedBytes>(kernel, p, tiles(p.sizes.q_len, C::kShape.q) * batch_heads(p.sizes), stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::bwd_dkdv(const AttentionParams& p, cudaStream_t stream) {
  using C = Dkdv<T, kHeadSize>;
  const bool modified = is_modified(p) || p.dout.data == nullptr;
  const int64_t blocks = tiles(p.sizes.kv_len, C::kShape.kv) * p.sizes.batch * (p.sizes.heads / p.sizes.group);
  return modified ? dkdv<T, kHeadSize, true>(p, blocks, stream) : dkdv<T, kHeadSize, false>(p, blocks, stream);
}

template <class T, int kHeadSize>
cudaError_t Passes<T, kHeadSize>::bwd_bias(const AttentionParams& p, cudaStream_t stream) {
  using C = Dq<T, kHeadSize, Pass::kBias>;
  const int64_t own_q = p.over_q ? 1 : tiles(p.sizes.q_len, C::kShape.q), own_kv = p.over_kv ? 1 : tiles(p.sizes.kv_len, C::kShape.kv);
  const int64_t blocks = own_q * own_kv * (p.sizes.batch / p.over_batch) * (p.sizes.heads / p.over_heads);
  return launch<C::kThreads, C::kSharedBytes>(attention_bwd_bias_kernel<T, kHeadSize>, p, blocks, stream);
}

template struct Passes<FUSED_ATTN_DTYPE, FUSED_ATTN_HEAD_SIZE>;

}  // namespace fused_attn
