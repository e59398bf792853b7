// Rows of up to W columns, several to a vector: each row takes a power of two of lanes, and what it needs of its neighbours comes from
// exchanges of lanes. Blocks that do not lie like that in memory are copied into rooms that do.
#pragma once

#include "cpu/softmax_rows.h"

namespace fused_attn::cpu {
namespace {

// Lanes of a block: its rooms stay in the first-level cache.
constexpr int64_t kBlockLanes = 1024;

struct Largest {
  FUSED_ATTN_INLINE vf operator()(vf a, vf b) const { return larger(a, b); }
};
struct Sum {
  FUSED_ATTN_INLINE vf operator()(vf a, vf b) const { return a + b; }
};

// Every lane gets what the S lanes of its row come to.
template <int S, class Op>
FUSED_ATTN_INLINE vf across(vf x, Op op) {
  if constexpr (S >= 2) x = op(x, swapped<1>(x));
  if constexpr (S >= 4) x = op(x, swapped<2>(x));
  if constexpr (S >= 8) x = op(x, swapped<4>(x));
  if constexpr (S >= 16) x = op(x, swapped<8>(x));
  return x;
}

FUSED_ATTN_INLINE vi is_set_or_all(const uint8_t* p, int64_t j) { return p ? is_set(p + j) : vi{} == 0; }

template <int S>
FUSED_ATTN_INLINE vf log_across(vf x) {
  float t[W];
  store(t, x);
  for (int i = 0; i < W; i += S) {
    const float l = logf(t[i]);
    for (int k = 0; k < S; ++k) t[i + k] = l;
  }
  return load(t);
}

// Probabilities (or their logarithms) of n lanes of scores; `ok` are bytes, or nullptr where all may attend.
template <int S, bool kLog>
__attribute__((noinline)) void normalise(const float* scores, const uint8_t* ok, float* to, int64_t n, float of_empty) {
  for (int64_t j = 0; j < n; j += W) {
    const vi yes = is_set_or_all(ok, j);
    const vf x = select(yes, load(scores + j), all(-kInf));
    vf top = across<S>(x, Largest{});
    top = select(top == -kInf, vf{}, top);
    const vf e = exp_of(x - top), total = across<S>(e, Sum{});
    const vf value = kLog ? x - top - log_across<S>(total) : e / total;
    const vf result = select(yes, value, all(kLog ? -kInf : 0.f));
    store(to + j, select(total == 0.f, all(of_empty), result));
  }
}

// What a gradient is made of: the result, what arrives there, scores where a row without keys is uniform and looks like any other, and
// bytes or nullptr where all may attend.
struct Arriving {
  const float *result, *dout, *scores;
  const uint8_t* ok;
};

// Gradients of n lanes of scores, times a factor.
template <int S, bool kLog>
__attribute__((noinline)) void differentiate(const Arriving& a, float* to, int64_t n, float factor) {
  for (int64_t j = 0; j < n; j += W) {
    const vi yes = is_set_or_all(a.ok, j);
    const vf r = load(a.result + j), g = select(yes, load(a.dout + j), vf{});
    const vf p = kLog ? exp_of(r) : r;
    const vf inner = across<S>(kLog ? g : select(yes, g * p, vf{}), Sum{});
    const vf ds = kLog ? g - p * inner : p * (g - inner);
    const vf weight = a.scores ? select(yes, select(load(a.scores + j) == -kInf, vf{}, all(1.f)), vf{}) : select(yes, p, vf{});
    const vi lives = across<S>(weight, Sum{}) != 0.f;
    store(to + j, select(yes & lives, ds * factor, vf{}));
  }
}

// Rows of a block, `lanes` floats each.
struct Block {
  Place first;
  int64_t rows;
  int lanes;

  int64_t size() const { return rows * lanes; }
  // The last vector may hold fewer rows.
  int64_t end() const { return padded(size()); }
};

// Rows of `width` elements that lie one behind the other, to `lanes` apart or back: whole lanes are moved at a time, so that what lies
// beyond a row's width is its neighbour's, until the row after sets it right; the last rows, which have none to do so, move by the element.
template <class T, int kLanes>
void move_rows(const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t width) {
  const int64_t whole = larger_of(0, rows - (kLanes + width - 1) / width);
  for (int64_t i = 0; i < whole; ++i) memcpy(to + i * to_step, from + i * from_step, kLanes * sizeof(T));
  for (int64_t i = whole; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) to[i * to_step + j] = from[i * from_step + j];
}

template <class T>
void move_lanes(int lanes, const T* from, int64_t from_step, T* to, int64_t to_step, int64_t rows, int64_t width) {
  switch (lanes) {
    case 4: return move_rows<T, 4>(from, from_step, to, to_step, rows, width);
    case 8: return move_rows<T, 8>(from, from_step, to, to_step, rows, width);
    default: return move_rows<T, 16>(from, from_step, to, to_step, rows, width);
  }
}

// Rows of a matrix into `to`; what lies beyond a row's columns is nobody's business.
inline void gather(const Matrix& m, const Order& order, const Block& block, int64_t kv_len, bool dense, float* to) {
  if (dense && block.lanes == kv_len) {
    load_row(row_at(m, block.first), m.dtype, 1, block.size(), to);
  } else if (dense && m.dtype == kFloat) {
    move_lanes(block.lanes, reinterpret_cast<const float*>(row_at(m, block.first)), kv_len, to, block.lanes, block.rows, kv_len);
  } else {
    Place p = block.first;
    for (int64_t i = 0; i < block.rows; ++i, order.advance(p)) {
      const char* row = row_at(m, p);
      float* lanes = to + i * block.lanes;
      const int64_t step = m.col * width_of(m.dtype);
      for (int64_t j = 0; j < kv_len; ++j) lanes[j] = load_one(row + j * step, m.dtype);
    }
  }
}

// The rows' columns of `from` into a matrix.
inline void scatter(const float* from, const Order& order, const Block& block, int64_t kv_len, const Matrix& m, bool dense) {
  if (dense && block.lanes == kv_len) return store_row(row_at(m, block.first), m.dtype, 1, block.size(), from);
  if (dense && m.dtype == kFloat)
    return move_lanes(block.lanes, from, block.lanes, reinterpret_cast<float*>(row_at(m, block.first)), kv_len, block.rows, kv_len);
  Place p = block.first;
  for (int64_t i = 0; i < block.rows; ++i, order.advance(p)) {
    char* row = row_at(m, p);
    const int64_t step = m.col * width_of(m.dtype);
    for (int64_t j = 0; j < kv_len; ++j) store_one(row + j * step, m.dtype, from[i * block.lanes + j]);
  }
}

// Bytes of a block, or nullptr where everything may attend and rows fill their lanes. `in_order`: its rows follow one another as a
// contiguous tensor's do.
inline const uint8_t* block_bytes(const Softmax& s, const Order& order, const Block& block, bool in_order, uint8_t* room) {
  const int64_t kv_len = s.sizes.kv_len;
  const bool is_open = !has_intervals(s.mask) && s.mask.keep_count == 0;
  if (is_open && block.lanes == kv_len) return nullptr;
  if (is_open || (in_order && is_dense_keep(s.mask, s.sizes))) {
    if (is_open) memset(room, 1, static_cast<size_t>(block.size()));
    else if (block.lanes == kv_len) memcpy(room, keep_of(s.mask, block.first), static_cast<size_t>(block.size()));
    else move_lanes(block.lanes, keep_of(s.mask, block.first), kv_len, room, block.lanes, block.rows, kv_len);
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t j = kv_len; j < block.lanes; ++j) room[i * block.lanes + j] = 0;
  } else {
    Place p = block.first;
    for (int64_t i = 0; i < block.rows; ++i, order.advance(p)) {
      uint8_t* to = room + i * block.lanes;
      const Allowed keys = allowed_of(s.mask, p, kv_len, to);
      for (int64_t j = 0; j < block.lanes; ++j) to[j] = keys(j);
    }
  }
  for (int64_t j = block.size(); j < block.end(); ++j) room[j] = 0;
  return room;
}

// One thread's room for a block.
struct BlockRooms {
  float a[kBlockLanes + W], b[kBlockLanes + W], c[kBlockLanes + W], d[kBlockLanes + W];
  uint8_t bytes[kBlockLanes + W];
};

// scale * x + bias of a block, in rooms.a.
inline void block_scores(const Softmax& s, const Order& order, const Block& block, bool dense, BlockRooms& rooms) {
  gather(s.x, order, block, s.sizes.kv_len, dense, rooms.a);
  const float scale = static_cast<float>(s.scale);
  if (scale != 1.f)
    for (int64_t j = 0; j < block.size(); ++j) rooms.a[j] *= scale;
  if (!s.bias.data) return;
  gather(s.bias, order, block, s.sizes.kv_len, false, rooms.b);
  for (int64_t j = 0; j < block.size(); ++j) rooms.a[j] += rooms.b[j];
}

// Keys that are removed and the factor of the others, [rows, lanes].
inline void block_factors(const Dropout& d, const Order& order, const Block& block, int64_t kv_len, float* to) {
  float room[8 * W];
  Place p = block.first;
  for (int64_t i = 0; i < block.rows; ++i, order.advance(p)) {
    const float* factors = dropout_row(d, p.dims[0], p.dims[1], p.dims[2], 0, kv_len, room);
    for (int64_t j = 0; j < block.lanes; ++j) to[i * block.lanes + j] = j < kv_len ? factors[j] : 0.f;
  }
}

}  // namespace
}  // namespace fused_attn::cpu
