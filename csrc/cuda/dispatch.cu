// From a call to the instantiation that serves it, and the summary of a dense mask that lets kernels skip its empty tiles.
#include "cuda/launch.cuh"
#include "cuda/passes.h"
#include "fused_attn/score_mod.cuh"

namespace fused_attn {

namespace {

int head_size(const Sizes& sizes) { return sizes.head_dim > sizes.value_dim ? sizes.head_dim : sizes.value_dim; }

template <class T, class Run>
cudaError_t by_head_size(int size, const Run& run) {
  if (size <= 64) return run(Passes<T, 64>());
  if (size <= 128) return run(Passes<T, 128>());
  return size <= 256 ? run(Passes<T, 256>()) : cudaErrorInvalidValue;
}

// run(Passes<T, kHeadSize>()) for the call's element type and the smallest head size that holds it.
template <class Run>
cudaError_t dispatch(const AttentionParams& p, DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kHalf: return by_head_size<half>(head_size(p.sizes), run);
    case DType::kBFloat16: return by_head_size<bfloat16>(head_size(p.sizes), run);
    default: return by_head_size<float>(head_size(p.sizes), run);
  }
}

struct SummaryParams {
  Matrix keep, summary;
  int q_len, kv_len, block_q, block_kv, q_tiles, kv_tiles, heads;
};

// One block per tile of keep: 0 nothing may attend, 1 mixed, 2 everything may.
__global__ void tile_summary_kernel(const __grid_constant__ SummaryParams p) {
  const int kv_tile = blockIdx.x % p.kv_tiles, q_tile = blockIdx.x / p.kv_tiles % p.q_tiles, bh = blockIdx.x / p.kv_tiles / p.q_tiles;
  const int b = bh / p.heads, h = bh % p.heads;
  bool some = false, every = true;
  for (int i = threadIdx.x; i < p.block_q * p.block_kv; i += blockDim.x) {
    const int q = q_tile * p.block_q + i / p.block_kv, kv = kv_tile * p.block_kv + i % p.block_kv;
    if (q >= p.q_len || kv >= p.kv_len) continue;
    const bool is_kept = *at<const uint8_t>(p.keep, b, h, q, kv) != 0;
    some |= is_kept, every &= is_kept;
  }
  some = __syncthreads_or(some), every = __syncthreads_and(every);
  if (threadIdx.x == 0) *at<int8_t>(p.summary, b, h, q_tile, kv_tile) = some + every;
}

}  // namespace

int mod_kind(std::string_view name) {
  for (size_t i = 0; i < std::size(kMods); ++i) {
    if (name == kMods[i].name) return static_cast<int>(i);
  }
  return -1;
}

std::string mod_list() {
  std::string list;
  for (const ModEntry& mod : kMods) list += (list.empty() ? "" : ",") + std::string(mod.name) + (mod.has_gradient ? ":1" : ":0");
  return list;
}

TileShape attention_tile_shape(Pass pass, const Sizes& sizes, DType dtype) {
  const int size = head_size(sizes);
  return tile_shape(pass, dtype == DType::kFloat ? 4 : 2, size <= 64 ? 64 : size <= 128 ? 128 : 256);
}

cudaError_t tile_summary(const Matrix& keep, const Matrix& summary, const Sizes& extent, TileShape shape, cudaStream_t stream) {
  const int q_tiles = static_cast<int>(tiles(extent.q_len, shape.q)), kv_tiles = static_cast<int>(tiles(extent.kv_len, shape.kv));
  const SummaryParams p{keep, summary, extent.q_len, extent.kv_len, shape.q, shape.kv, q_tiles, kv_tiles, extent.heads};
  return launch<128>(tile_summary_kernel, p, static_cast<int64_t>(extent.batch) * extent.heads * q_tiles * kv_tiles, stream);
}

cudaError_t attention_fwd(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.fwd(p, stream); });
}

cudaError_t attention_rows(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.rows(p, stream); });
}

cudaError_t attention_columns(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.columns(p, stream); });
}

cudaError_t attention_bwd_delta(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.bwd_delta(p, stream); });
}

cudaError_t attention_bwd_dq(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.bwd_dq(p, stream); });
}

cudaError_t attention_bwd_dkdv(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.bwd_dkdv(p, stream); });
}

cudaError_t attention_bwd_bias(const AttentionParams& p, DType dtype, cudaStream_t stream) {
  return dispatch(p, dtype, [&](auto passes) { return passes.bwd_bias(p, stream); });
}

}  // namespace fused_attn
