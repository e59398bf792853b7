// What both passes of the masked softmax share: the order of rows, what a row may attend to, and its scaled, biased and masked scores.
#pragma once

#include <cmath>

#include "cpu/convert.h"
#include "cpu/dropout.h"
#include "cpu/mask.h"
#include "cpu/params.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace fused_attn::cpu {
namespace {

// Elements of a task: below it a second thread costs more than it brings (a parallel region takes some microseconds, 2^14 elements about
// ten).
constexpr int64_t kTaskElements = 1 << 14;
// Elements summed up in float32 before they join a double: rows may have millions.
constexpr int64_t kSumElements = 4096;

struct Place {
  int64_t dims[3];  // batch, head, query
};

// Rows of [batch, heads, q_len] one after another, inner dimensions first; without outer ones the order is that of a contiguous tensor.
class Order {
 public:
  Order(const Sizes& s, const bool (&outer)[3]) : size_{s.batch, s.heads, s.q_len}, outer_{outer[0], outer[1], outer[2]} {}

  // How many rows have the same outer index.
  int64_t inner() const {
    int64_t n = 1;
    for (int d = 0; d < 3; ++d) n *= outer_[d] ? 1 : size_[d];
    return n;
  }
  int64_t count() const { return size_[0] * size_[1] * size_[2]; }

  Place at(int64_t index) const {
    Place p{};
    for (int outer = 0; outer < 2; ++outer)
      for (int d = 2; d >= 0; --d)
        if (outer_[d] == (outer == 1)) {
          p.dims[d] = index % size_[d];
          index /= size_[d];
        }
    return p;
  }

  void advance(Place& p) const {
    for (int outer = 0; outer < 2; ++outer)
      for (int d = 2; d >= 0; --d) {
        if (outer_[d] != (outer == 1)) continue;
        if (++p.dims[d] < size_[d]) return;
        p.dims[d] = 0;
      }
  }

 private:
  int64_t size_[3];
  bool outer_[3];
};

FUSED_ATTN_INLINE char* row_at(const Matrix& m, const Place& p) { return at(m, p.dims[0], p.dims[1], p.dims[2], 0); }

FUSED_ATTN_INLINE bool is_plain(const Matrix& m) { return m.dtype == kFloat && m.col == 1; }

// Whether rows in order lie one behind the other, without gaps.
inline bool is_dense(const Matrix& m, const Sizes& s) {
  return (m.col == 1 || s.kv_len == 1) && (m.row == s.kv_len || s.q_len == 1) && (m.head == s.q_len * s.kv_len || s.heads == 1) &&
         (m.batch == s.heads * s.q_len * s.kv_len || s.batch == 1);
}

// Keys of one row: those of an interval whose byte is set, or all of them without bytes. bytes[0] belongs to key 0.
struct Allowed {
  int64_t start, end;
  const uint8_t* bytes;

  bool operator()(int64_t j) const { return j >= start && j < end && (!bytes || bytes[j]); }
};

inline Allowed allowed_of(const Mask& m, const Place& p, int64_t kv_len, uint8_t* room) {
  Interval keys{0, kv_len};
  if (has_intervals(m)) keys = interval_of(m, p.dims[0], p.dims[2], kv_len);
  Allowed found{keys.start, keys.end, nullptr};
  for (int64_t i = 0; i < m.keep_count && found.start < found.end; ++i) {
    const Matrix& keep = m.keeps[i];
    const uint8_t* bytes = reinterpret_cast<uint8_t*>(keep.data) + p.dims[0] * keep.batch + p.dims[1] * keep.head + p.dims[2] * keep.row;
    if (keep.col == 0) {
      if (!*bytes) found.end = found.start;
    } else if (!found.bytes && keep.col == 1) {
      found.bytes = bytes;
    } else {
      for (int64_t j = found.start; j < found.end; ++j) room[j] = (!found.bytes || found.bytes[j]) && bytes[j * keep.col];
      found.bytes = room;
    }
  }
  if (found.start >= found.end) found.start = found.end = 0;
  return found;
}

// One thread's room for a row.
struct Rooms {
  float *values, *others, *third, *factors;
  double* sums;
  uint8_t* bytes;

  bool take(int64_t kv_len) {
    const int64_t row = padded(kv_len) + W, drawn = dropout_room(kv_len);
    char* p = static_cast<char*>(scratch(static_cast<size_t>(8 * row + 4 * (3 * row + drawn) + row)));
    if (!p) return false;
    sums = reinterpret_cast<double*>(p);
    values = reinterpret_cast<float*>(sums + row);
    others = values + row;
    third = others + row;
    factors = third + row;
    bytes = reinterpret_cast<uint8_t*>(factors + drawn);
    return true;
  }
};

// New pages of a task's rows all at once.
inline void touch_rows(const Matrix& m, const Order& order, int64_t first, int64_t last, int64_t kv_len) {
  Place p = order.at(first);
  for (int64_t r = first; r < last; ++r, order.advance(p)) touch_pages(row_at(m, p), m.dtype, m.col, kv_len);
}

// Columns from .. from + n of a row as float32: where they lie, or in `room`.
FUSED_ATTN_INLINE const float* columns_of(const Matrix& m, const Place& p, int64_t from, int64_t n, float* room) {
  const char* row = row_at(m, p) + from * m.col * width_of(m.dtype);
  if (is_plain(m)) return reinterpret_cast<const float*>(row);
  load_row(row, m.dtype, m.col, n, room);
  return room;
}

// Walks n columns: whole(j) for every vector, two at a time so that sums can take turns, and part(j, count) for what is left.
template <class Whole, class Part>
FUSED_ATTN_INLINE void walk(int64_t n, Whole whole, Part part) {
  int64_t j = 0;
  for (; j + 2 * W <= n; j += 2 * W) {
    whole(j, 0);
    whole(j + W, 1);
  }
  for (; j + W <= n; j += W) whole(j, 0);
  if (j < n) part(j, n - j);
}

// scale * x + bias, -inf where masked; returns the largest, or less where there is a NaN.
template <bool kBias, bool kKeep>
float write_scores(const float* x, float scale, const float* bias, const uint8_t* keep, int64_t n, float* to) {
  vf top[2] = {all(-kInf), all(-kInf)};
  walk(
      n,
      [&](int64_t j, int turn) {
        vf v = load(x + j) * scale;
        if (kBias) v += load(bias + j);
        if (kKeep) v = select(is_set(keep + j), v, all(-kInf));
        store(to + j, v);
        top[turn] = larger(top[turn], v);
      },
      [&](int64_t j, int64_t count) {
        vf v = load_part(x + j, count, 0.f) * scale;
        if (kBias) v += load_part(bias + j, count, 0.f);
        if (kKeep) v = select(is_set_part(keep + j, count), v, all(-kInf));
        store_part(to + j, count, v);
        top[1] = larger(top[1], load_part(to + j, count, -kInf));
      });
  return largest_of(larger(top[0], top[1]));
}

// exp(scores - top), kept in place if asked for; returns their sum, NaN where a score is NaN or +inf and 0 where all are -inf.
template <bool kKept>
double exponentials(float* scores, int64_t n, float top) {
  double total = 0.0;
  for (int64_t from = 0; from < n; from += kSumElements) {
    float* x = scores + from;
    vf sum[2] = {};
    walk(
        smaller_of(kSumElements, n - from),
        [&](int64_t j, int turn) {
          const vf e = exp_of(load(x + j) - top);
          if (kKept) store(x + j, e);
          sum[turn] += e;
        },
        [&](int64_t j, int64_t count) {
          const vf e = exp_of(load_part(x + j, count, -kInf) - top);
          if (kKept) store_part(x + j, count, e);
          sum[1] += e;
        });
    total += static_cast<double>(sum_of(sum[0] + sum[1]));
  }
  return total;
}

// A row's scores from keys.start on.
inline float scores_of(const Softmax& s, const Place& p, const Allowed& keys, const Rooms& rooms, float* to) {
  const int64_t n = keys.end - keys.start;
  const float scale = static_cast<float>(s.scale), *x = columns_of(s.x, p, keys.start, n, rooms.values);
  const uint8_t* bytes = keys.bytes ? keys.bytes + keys.start : nullptr;
  if (!s.bias.data)
    return bytes ? write_scores<false, true>(x, scale, nullptr, bytes, n, to)
                 : write_scores<false, false>(x, scale, nullptr, nullptr, n, to);
  const float* bias = columns_of(s.bias, p, keys.start, n, rooms.others);
  return bytes ? write_scores<true, true>(x, scale, bias, bytes, n, to) : write_scores<true, false>(x, scale, bias, nullptr, n, to);
}

// What every element of a row without keys becomes.
inline float of_empty_rows(const Softmax& s) {
  if (!s.is_uniform) return s.is_log ? -kInf : 0.f;
  const float share = static_cast<float>(1.0 / static_cast<double>(s.sizes.kv_len));
  return s.is_log ? logf(share) : share;
}

inline void fill_row(char* p, int64_t dtype, int64_t step, int64_t n, float value) {
  int64_t j = 0;
  if (dtype == kFloat && step == 1)
    for (; j + W <= n; j += W) store(reinterpret_cast<float*>(p) + j, all(value));
  for (; j < n; ++j) store_one(p + j * step * width_of(dtype), dtype, value);
}

// Whether a mask says nothing, or is one byte for every pair, in order.
inline bool is_dense_keep(const Mask& m, const Sizes& s) {
  return !has_intervals(m) && (m.keep_count == 0 || (m.keep_count == 1 && is_dense(m.keeps[0], s)));
}

// Bytes of such a mask from a row on, or nullptr where it says nothing.
inline const uint8_t* keep_of(const Mask& m, const Place& p) {
  const Matrix& keep = m.keeps[0];
  if (!m.keep_count) return nullptr;
  return reinterpret_cast<const uint8_t*>(keep.data) + p.dims[0] * keep.batch + p.dims[1] * keep.head + p.dims[2] * keep.row;
}

// Lanes that one row of kv_len columns takes in a vector that holds several rows, or 0 for longer rows.
inline int lanes_of(int64_t kv_len) {
  int lanes = 1;
  while (lanes < kv_len && lanes <= W) lanes *= 2;
  return lanes <= W ? lanes : 0;
}

// How many threads are worth waking.
inline int64_t threads_for(int64_t threads, int64_t tasks) { return larger_of(1, smaller_of(threads, tasks)); }

}  // namespace
}  // namespace fused_attn::cpu
