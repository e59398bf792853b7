// The launchers: one per pass, called by the bindings alone. They choose a configuration, launch on `stream`, and return the launch's
// error.
#pragma once

#include <cuda_runtime_api.h>

#include <string>
#include <string_view>

#include "cuda/configs.h"
#include "fused_attn/params.h"

namespace fused_attn {

// The kind of score modification with a name of the normal form, or -1; and all of them, as "name:has_gradient" separated by commas.
int mod_kind(std::string_view name);
std::string mod_list();

// The tile of a pass for a call; keep's summary has one entry per tile of it.
TileShape attention_tile_shape(Pass pass, const Sizes& sizes, DType dtype);
// summary int8 [batch, heads, q tiles, kv tiles] of keep, whose own sizes are `extent`.
cudaError_t tile_summary(const Matrix& keep, const Matrix& summary, const Sizes& extent, TileShape shape, cudaStream_t stream);

cudaError_t attention_fwd(const AttentionParams& params, DType dtype, cudaStream_t stream);
// probs, scores, max_scores and entropy, whichever are there.
cudaError_t attention_rows(const AttentionParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_columns(const AttentionParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_bwd_delta(const AttentionParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_bwd_dq(const AttentionParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_bwd_dkdv(const AttentionParams& params, DType dtype, cudaStream_t stream);
cudaError_t attention_bwd_bias(const AttentionParams& params, DType dtype, cudaStream_t stream);

cudaError_t softmax_fwd(const SoftmaxParams& params, DType dtype, cudaStream_t stream);
// dx and dbias, whichever are there.
cudaError_t softmax_bwd(const SoftmaxParams& params, DType dtype, cudaStream_t stream);

}  // namespace fused_attn
