// Additive scores sum_d w_d tanh(q_d + k_d) (Bahdanau et al., arXiv 1409.0473) of one tile, and their gradients.
#pragma once

#include "cpu/operands.h"

namespace fused_attn::cpu {
namespace {

// NaN in the lanes of keys, and as a number for a query, that hold anything but finite numbers: tanh alone would make 1 of an infinity.
FUSED_ATTN_INLINE vf broken_keys(int64_t depth, const float* panel) {
  vf s{};
  for (int64_t d = 0; d < depth; ++d) s += load(panel + d * kPanel) * 0.f;
  return s;
}

// s[i * s_row + j] for rows x keys, in vectors.
inline void additive_scores(int64_t rows, int64_t depth, const float* q, int64_t q_row, const float* panels, int64_t keys,
                            const float* weight, float* s, int64_t s_row) {
  for (int64_t j = 0; j < keys; j += W) {
    const float* const panel = panels + j / kPanel * kPanel * depth + j % kPanel;
    const vf broken = broken_keys(depth, panel);
    for (int64_t i = 0; i < rows; ++i) {
      const float* const row = q + i * q_row;
      vf sum{};
      for (int64_t d = 0; d < depth; ++d) sum += tanh_of(all(row[d]) + load(panel + d * kPanel)) * weight[d];
      if (!are_finite(row, depth)) sum = all(kNaN);
      store(s + i * s_row + j, sum + broken);
    }
  }
}

// Adds to dq [rows], dk [keys] (rows `dk_row` apart) and dweight [depth] what ds [rows x keys] sends back; pairs with ds = 0 send nothing.
// `room`: [depth * kPanel].
inline void additive_gradients(int64_t rows, int64_t depth, const float* q, int64_t q_row, const float* panels, int64_t keys, int64_t valid,
                               const float* weight, const float* ds, int64_t ds_row, float* dq, int64_t dq_row, float* dk, int64_t dk_row,
                               float* dweight, float* room) {
  for (int64_t j = 0; j < keys; j += W) {
    const float* const panel = panels + j / kPanel * kPanel * depth + j % kPanel;
    for (int64_t d = 0; d < depth; ++d) {
      const vf k = load(panel + d * kPanel);
      const vf w = all(weight[d]);
      vf to_key{}, to_weight{};
      for (int64_t i = 0; i < rows; ++i) {
        const vf g = load(ds + i * ds_row + j), t = tanh_of(all(q[i * q_row + d]) + k);
        const vi none = g == 0.f;
        const vf part = select(none, vf{}, g * (1.f - t * t) * w);
        to_weight += select(none, vf{}, g * t);
        to_key += part;
        dq[i * dq_row + d] += sum_of(part);
      }
      dweight[d] += sum_of(to_weight);
      store(room + d * W, to_key);
    }
    for (int64_t l = 0; l < W && j + l < valid; ++l)
      for (int64_t d = 0; d < depth; ++d) dk[(j + l) * dk_row + d] += room[d * W + l];
  }
}

}  // namespace
}  // namespace fused_attn::cpu
