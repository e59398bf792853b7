// Probabilities of one tile and the gradients of its scores, shared by the passes of the backward.
#pragma once

#include "cpu/scores.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kGradientRows = 48;  // query rows of a tile of the backward: two groups
// Rows of a tile lie this far apart: powers of two would put a column of them into one set of the first-level cache.
constexpr int64_t kTileRow = kTile + 16;

// p = exp(scale * sums - top) / sum. The scaled sum is rounded as the forward rounds it: scores of 1e9 contracted into one rounding were
// off by 32, and p was e^32 instead of 1.
struct StoreProbability {
  float* p;
  vf scale;
  const float *base, *inverse;  // of the rows

  FUSED_ATTN_INLINE void before(int64_t, int64_t, int) const {}
  template <int M, int N>
  FUSED_ATTN_INLINE void operator()(int64_t i, int64_t j, vf (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const vf m = all(base[i + r]), f = all(inverse[i + r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(p + (i + r) * kTileRow + j + n * W, exp_of(rounded(acc[r][n] * scale) - m) * f);
    }
  }
};

// ds = p * (sums - delta). A row's only key gets what arrives at lse alone: sums and delta are the same number there, made in different
// orders. `only`: its probability, 1, or 2 where a row has more keys.
FUSED_ATTN_INLINE vf softmax_gradient(vf p, vf sums, vf delta, vf only, vf dlse) {
  const vf difference = sums - delta;
  return select(p == only, difference * 0.f + dlse, p * difference);  // a NaN that arrives stays one
}

struct StoreGradient {
  float* ds;
  const float *p, *delta, *only, *dlse;

  FUSED_ATTN_INLINE void before(int64_t, int64_t, int) const {}
  template <int M, int N>
  FUSED_ATTN_INLINE void operator()(int64_t i, int64_t j, vf (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      const vf d = all(delta[i + r]), o = all(only[i + r]), l = all(dlse[i + r]);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const int64_t here = (i + r) * kTileRow + j + n * W;
        store(ds + here, softmax_gradient(load(p + here), acc[r][n], d, o, l));
      }
    }
  }
};

// ds = sums.
struct StoreSums {
  float* ds;

  FUSED_ATTN_INLINE void before(int64_t, int64_t, int) const {}
  template <int M, int N>
  FUSED_ATTN_INLINE void operator()(int64_t i, int64_t j, vf (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r)
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(ds + (i + r) * kTileRow + j + n * W, acc[r][n]);
  }
};

class GradientTile {
 public:
  // `rows`: the most rows that `begin_rows` will be asked for.
  void reserve(Arena& arena, const Attention& call, int64_t rows) {
    call_ = &call;
    const Sizes& s = call.sizes;
    q_row = padded(s.head_dim);
    dout_row = padded(s.value_dim);
    has_saved_ = call.saved.data && call.saved.dtype == kFloat && !call.weight.data;
    int64_t slopes = 0;
    for (int64_t m = 0; m < call.mod_count; ++m) slopes += has_slope(call.mods[m].kind);
    has_saved_ &= slopes == 0;
    is_simple_ = !call.dropout.seed && !call.dprobs.data && !call.dscores.data && !call.is_sigmoid && call.dout.data;
    slopes_.wanted = slopes > 0;
    for (int64_t m = 0; m < call.mod_count; ++m)
      slopes_.tiles[m] = has_slope(call.mods[m].kind) ? arena.take<float>(kGradientRows * kTile) : nullptr;
    keys_.reserve(arena, s.kv_len, s.head_dim);
    values_.reserve(arena, s.kv_len, s.value_dim);
    q = arena.take<float>(kGradientRows * q_row);
    dout = arena.take<float>(kGradientRows * dout_row);
    p = arena.take<float>(kGradientRows * kTileRow);
    ds = arena.take<float>(kGradientRows * kTileRow);
    allowed = arena.take<uint8_t>(kGradientRows * kTile);
    room_ = arena.take<float>(dropout_room(kTile) + kTile);
    base_ = arena.take<float>(rows);
    inverse_ = arena.take<float>(rows);
    delta_ = arena.take<float>(rows);
    only_ = arena.take<float>(rows);
    dlse_ = arena.take<float>(rows);
    out_ = arena.take<float>(kChains * padded(s.value_dim));
  }

  void begin_pair(int64_t b, int64_t kv_head) {
    b_ = b;
    keys_.begin({&call_->k, b, kv_head, call_->sizes.kv_len, call_->sizes.head_dim});
    values_.begin({&call_->v, b, kv_head, call_->sizes.kv_len, call_->sizes.value_dim});
  }

  // Rows r0 .. r0 + rows of head h: their statistics, and what softmax takes off every element's gradient.
  void begin_rows(int64_t h, int64_t r0, int64_t rows) {
    h_ = h, r0_ = r0;
    scorer_.begin(*call_, b_, h);
    const int64_t first = (b_ * call_->sizes.heads + h) * call_->sizes.q_len + r0;
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = call_->sum[first + i], top = call_->top[first + i];
      base_[i] = top == -kInf ? 0.f : top;
      inverse_[i] = sum == 0.f ? 0.f : 1.f / sum;
      delta_[i] = 0.f;
    }
    if (call_->is_sigmoid) return;
    for (int64_t i = 0; i < rows; i += kGradientRows) sum_probs(i, smaller_of(kGradientRows, rows - i));
    for (int64_t i = 0; i < rows; i += kChains) sum_out(i, smaller_of(kChains, rows - i));
    for (int64_t i = 0; i < rows; ++i) {
      const bool dead = inverse_[i] == 0.f;
      // Of a row without scores the sink alone hears.
      const bool hears = call_->dlse.data && call_->top[first + i] != -kInf;
      dlse_[i] = hears ? load_one(at(call_->dlse, b_, h, r0 + i, 0), call_->dlse.dtype) : 0.f;
      const float delta = (dead ? 0.f : delta_[i]) - dlse_[i];
      delta_[i] = dead ? 0.f : delta;
      only_[i] = call_->sum[first + i] == 1.f && has_one_key(r0 + i) ? 1.f : 2.f;
      if (call_->delta) call_->delta[first + i] = delta;
    }
  }

  // A block of those rows from q0 on.
  void begin_block(int64_t q0, int64_t rows) {
    q0_ = q0, rows_ = rows;
    mask_.begin(call_->mask, b_, h_, q0, rows, call_->sizes.kv_len);
    copy_rows(call_->q, b_, h_, q0, rows, call_->sizes.head_dim, q);
    if (call_->dout.data) copy_rows(call_->dout, b_, h_, q0, rows, call_->sizes.value_dim, dout);
    // A row that attends to nothing sends nothing, whatever it holds.
    has_dead_ = false;
    for (int64_t i = 0; i < rows; ++i) {
      if (!is_dead(i)) continue;
      has_dead_ = true;
      memset(dout + i * dout_row, 0, static_cast<size_t>(dout_row) * 4);
      memset(q + i * q_row, 0, static_cast<size_t>(q_row) * 4);
    }
    q_broken = !are_finite(q, rows * q_row);
    dout_broken = call_->dout.data && !are_finite(dout, rows * dout_row);
  }

  int64_t keys_of(int64_t t) const { return smaller_of(kTile, call_->sizes.kv_len - t * kTile); }
  // A row without scores has no allowed pair, also where the mask has one.
  Kind kind(int64_t t) const {
    const Kind found = mask_.kind(t * kTile, keys_of(t));
    return found == kFull && has_dead_ ? kMixed : found;
  }
  const float* key_panels(int64_t t) { return keys_.tile(t); }
  const Scorer& scorer() const { return scorer_; }

  // Fills p (after dropout) and ds of the block and tile t, and `allowed` where it is mixed; 0 in masked pairs, up to a whole vector.
  void make(int64_t t, Kind kind) {
    if (kind == kMixed) mask_.bytes(t * kTile, keys_of(t), allowed);
    for (int64_t i = 0; has_dead_ && i < rows_; ++i)
      if (is_dead(i)) memset(allowed + i * kTile, 0, kTile);
    for (int64_t i = 0; i < rows_; i += kGroup) {
      const int64_t rows = smaller_of(kGroup, rows_ - i);
      make_probs(i, rows, t, kind);
      make_gradients(i, rows, t, kind);
    }
  }

  // ds *= the derivative of modification m; 0 stays 0.
  void through(int64_t m, int64_t t) {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t j = 0; j < padded(keys_of(t)); j += W) {
        float* const x = ds + i * kTileRow + j;
        store(x, select(load(x) == 0.f, vf{}, load(x) * load(slopes_.tiles[m] + i * kTile + j)));
      }
  }

  float *q, *dout, *p, *ds;  // of the block: [rows][q_row], [rows][dout_row], [rows][kTileRow]
  int64_t q_row, dout_row;
  bool q_broken, dout_broken;
  uint8_t* allowed;  // [rows][kTile]

 private:
  bool is_dead(int64_t i) const { return inverse_[q0_ - r0_ + i] == 0.f; }

  // Rows whose sums are made side by side: each is one chain of additions.
  static constexpr int64_t kChains = 4;

  // Adds dout . out to delta of rows i0 .. i0 + rows, in the order in which the product with the values adds: where one key has all the
  // weight, out is its value, and its gradient the difference of two equal numbers.
  void sum_out(int64_t i0, int64_t rows) {
    if (!call_->dout.data) return;
    const int64_t width = call_->sizes.value_dim, stride = padded(width);
    for (int64_t i = 0; i < rows; ++i) {
      load_row(at(call_->out, b_, h_, r0_ + i0 + i, 0), call_->out.dtype, call_->out.col, width, out_ + i * stride);
      load_row(at(call_->dout, b_, h_, r0_ + i0 + i, 0), call_->dout.dtype, call_->dout.col, width, dout + i * stride);
    }
    float sums[kChains] = {};
    for (int64_t d = 0; d < width; ++d)
      for (int64_t i = 0; i < kChains; ++i) sums[i] = added(sums[i], dout[i * stride + d], out_[i * stride + d]);
    for (int64_t i = 0; i < rows; ++i) delta_[i0 + i] += sums[i];
  }

  // Whether a row has one allowed key and no sink beside it.
  bool has_one_key(int64_t row) {
    if (call_->sinks.data && load_one(at(call_->sinks, 0, h_, 0, 0), call_->sinks.dtype) != -kInf) return false;
    const Interval keys = interval_of(call_->mask, b_, row, call_->sizes.kv_len);
    if (call_->mask.keep_count == 0 || keys.end - keys.start <= 1) return keys.end - keys.start == 1;
    mask_.begin(call_->mask, b_, h_, row, 1, call_->sizes.kv_len);
    int64_t count = 0;
    for (int64_t t = keys.start / kTile; count < 2 && t < tiles_of(keys.end); ++t) {
      mask_.row(0, t * kTile, keys_of(t), allowed);
      for (int64_t j = 0; j < kTile; ++j) count += allowed[j];
    }
    return count == 1;
  }

  // Adds probs . dprobs over the allowed keys to delta of rows i0 .. i0 + rows.
  void sum_probs(int64_t i0, int64_t rows) {
    if (!call_->dprobs.data) return;
    mask_.begin(call_->mask, b_, h_, r0_ + i0, rows, call_->sizes.kv_len);
    for (int64_t t = 0; t < tiles_of(call_->sizes.kv_len); ++t) {
      const int64_t n = keys_of(t);
      const Kind kind = mask_.kind(t * kTile, n);
      for (int64_t i = i0; kind != kNone && i < i0 + rows; ++i) {
        mask_.row(i - i0, t * kTile, n, allowed);
        const float* const probs = padded_row(call_->saved, r0_ + i, t, p);
        const float* const grads = padded_row(call_->dprobs, r0_ + i, t, ds);
        vf s{};
        for (int64_t j = 0; j < n; j += W) s += select(is_set(allowed + j), load(probs + j) * load(grads + j), vf{});
        delta_[i] += sum_of(s);
      }
    }
  }

  // Columns of tile t of a row as float32, zeros after the last key.
  const float* padded_row(const Matrix& m, int64_t row, int64_t t, float* room) const {
    const int64_t n = keys_of(t);
    const float* const from = row_of(m, b_, h_, row, t * kTile, n, room);
    for (int64_t j = n; from == room && j < padded(n); ++j) room[j] = 0.f;
    return from;
  }

  void make_probs(int64_t i0, int64_t rows, int64_t t, Kind kind) {
    const int64_t n = keys_of(t), at_row = q0_ - r0_ + i0;
    float* const to = p + i0 * kTileRow;
    if (has_saved_) {
      for (int64_t i = 0; i < rows; ++i)
        load_row(at(call_->saved, b_, h_, q0_ + i0 + i, t * kTile), kFloat, call_->saved.col, n, to + i * kTileRow);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = n; j < padded(n); ++j) to[i * kTileRow + j] = 0.f;
      return;
    }
    if (scorer_.is_plain() && kind == kFull && !call_->is_sigmoid) {
      StoreProbability emit{to, all(static_cast<float>(call_->scale)), base_ + at_row, inverse_ + at_row};
      return multiply_panels(rows, call_->sizes.head_dim, q + i0 * q_row, q_row, keys_.tile(t), padded(n), emit);
    }
    Slopes slopes = slopes_;
    for (int64_t m = 0; m < call_->mod_count; ++m)
      if (slopes.tiles[m]) slopes.tiles[m] += i0 * kTile;
    scorer_.score({q0_ + i0, rows, q + i0 * q_row, q_row, keys_.tile(t), t * kTile, n}, to, kTileRow, nullptr, slopes);
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* const keep = kind == kMixed ? allowed + (i0 + i) * kTile : nullptr;
      if (call_->is_sigmoid) weigh(to + i * kTileRow, n, keep);
      else exponentiate(to + i * kTileRow, n, keep, base_[at_row + i], inverse_[at_row + i]);
    }
  }

  static void exponentiate(float* s, int64_t n, const uint8_t* keep, float base, float inverse) {
    for (int64_t j = 0; j < n; j += W) {
      const vf x = exp_of(load(s + j) - base) * inverse;
      store(s + j, keep ? select(is_set(keep + j), x, vf{}) : x);
    }
  }

  void weigh(float* s, int64_t n, const uint8_t* keep) const {
    const vf bias = all(static_cast<float>(call_->sigmoid_bias));
    for (int64_t j = 0; j < n; j += W) {
      const vf x = load(s + j) + bias, e = exp_of(x > 0.f ? -x : x), y = (x > 0.f ? all(1.f) : e) / (1.f + e);
      store(s + j, keep ? select(is_set(keep + j), y, vf{}) : y);
    }
  }

  void make_gradients(int64_t i0, int64_t rows, int64_t t, Kind kind) {
    const int64_t n = keys_of(t), depth = call_->sizes.value_dim;
    float* const to = ds + i0 * kTileRow;
    if (is_simple_) {
      StoreGradient emit{to, p + i0 * kTileRow, delta_ + (q0_ - r0_ + i0), only_ + (q0_ - r0_ + i0), dlse_ + (q0_ - r0_ + i0)};
      multiply_panels(rows, depth, dout + i0 * dout_row, dout_row, values_.tile(t), padded(n), emit);
      if (kind == kMixed)
        for (int64_t i = 0; i < rows; ++i) clear_masked(to + i * kTileRow, n, allowed + (i0 + i) * kTile);
      return;
    }
    if (call_->dout.data) {
      StoreSums emit{to};
      multiply_panels(rows, depth, dout + i0 * dout_row, dout_row, values_.tile(t), padded(n), emit);
    } else {
      memset(to, 0, static_cast<size_t>(rows * kTileRow) * 4);
    }
    for (int64_t i = 0; i < rows; ++i) {
      differentiate(i0 + i, t);
      if (kind == kMixed) clear_masked(to + i * kTileRow, n, allowed + (i0 + i) * kTile);
    }
  }

  static void clear_masked(float* x, int64_t n, const uint8_t* keep) {
    for (int64_t j = 0; j < n; j += W) store(x + j, select(is_set(keep + j), load(x + j), vf{}));
  }

  // From the gradient of what multiplies the values to that of the modified scores; p becomes what multiplies the values.
  void differentiate(int64_t i, int64_t t) {
    const int64_t n = keys_of(t), row = q0_ + i;
    float *const weights = p + i * kTileRow, *const g = ds + i * kTileRow;
    const float* const z = call_->dropout.seed ? dropout_row(call_->dropout, b_, h_, row, t * kTile, kTile, room_) : nullptr;
    const float* const further = call_->dprobs.data ? padded_row(call_->dprobs, row, t, column_) : nullptr;
    const vf d = all(delta_[row - r0_]), o = all(only_[row - r0_]), l = all(dlse_[row - r0_]);
    const bool dead = inverse_[row - r0_] == 0.f;
    for (int64_t j = 0; j < n; j += W) {
      const vf w = load(weights + j);
      vf x = load(g + j);
      if (z) {
        x *= load(z + j);
        store(weights + j, w * load(z + j));
      }
      if (further) x += load(further + j);
      store(g + j, dead ? vf{} : call_->is_sigmoid ? w * (1.f - w) * x : softmax_gradient(w, x, d, o, l));
    }
    if (!call_->dscores.data || dead) return;
    const float* const direct = padded_row(call_->dscores, row, t, column_);
    for (int64_t j = 0; j < n; j += W) store(g + j, load(g + j) + load(direct + j));
  }

  const Attention* call_;
  bool has_saved_, is_simple_, has_dead_ = false;
  Slopes slopes_;
  Panels keys_, values_;
  Scorer scorer_;
  BlockMask mask_;
  int64_t b_ = 0, h_ = 0, r0_ = 0, q0_ = 0, rows_ = 0;
  float *room_, *base_, *inverse_, *delta_, *only_, *dlse_, *out_;
  float column_[kTile];
};

}  // namespace
}  // namespace fused_attn::cpu
