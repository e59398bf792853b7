// Masked softmax, forward: softmax(scale * x + bias) over the keys that each row may attend to, or its logarithm, and dropout of it.
#include "cpu/softmax_rows.h"
#include "cpu/softmax_thin.h"

namespace fused_attn::cpu {
namespace {

struct Forward {
  const Softmax& s;
  Order order;
  Tasks tasks;
  int64_t step;  // rows of a task
  int lanes;     // of a row that shares its vector with others; 0: of its own
  float of_empty;
  int failed;
};

// n probabilities, or logarithms, into columns from .. from + n of a row.
void put(const Matrix& m, const Place& p, int64_t from, int64_t n, const float* values) {
  store_row(row_at(m, p) + from * m.col * width_of(m.dtype), m.dtype, m.col, n, values);
}

// What is not in keys: zeros, or -inf.
void put_outside(const Matrix& m, const Place& p, const Allowed& keys, int64_t kv_len, float value) {
  char* row = row_at(m, p);
  const int64_t step = m.col * width_of(m.dtype);
  fill_row(row, m.dtype, m.col, keys.start, value);
  fill_row(row + keys.end * step, m.dtype, m.col, kv_len - keys.end, value);
}

// Vectors of a row that stays in registers: what is stored in parts and loaded again at once waits for the store, 200 cycles a row of 17
// columns.
constexpr int kShort = 8;

// n columns from x[0] on, V vectors of them; returns the sum of exponentials, 0 where all are -inf, which the caller replaces.
template <int V>
float normalise_short(const Forward& f, const float* x, const float* bias, const uint8_t* keep, int64_t n, float* to) {
  const float scale = static_cast<float>(f.s.scale);
  const int64_t last = n - (V - 1) * W;
  const vi first = lanes_below(last);
  auto allowed = [&](int i) { return keep ? (i < V - 1 ? is_set(keep + i * W) : is_set_part(keep + i * W, last)) : vi{} == 0; };
  vf v[V], top = all(-kInf), sum{};
  for (int i = 0; i < V; ++i) {
    v[i] = (i < V - 1 ? load(x + i * W) : load_part(x + i * W, last, 0.f)) * scale;
    if (bias) v[i] += i < V - 1 ? load(bias + i * W) : load_part(bias + i * W, last, 0.f);
    if (keep) v[i] = select(allowed(i), v[i], all(-kInf));
    if (i == V - 1) v[i] = select(first, v[i], all(-kInf));
    top = larger(top, v[i]);
  }
  const float largest = largest_of(top), shift = largest == -kInf ? 0.f : largest;
  for (int i = 0; i < V; ++i) {
    v[i] -= shift;
    const vf e = exp_of(v[i]);
    sum += e;
    if (!f.s.is_log) v[i] = e;
  }
  const float total = sum_of(sum), share = 1.f / total, rest = f.s.is_log ? logf(total) : 0.f;
  for (int i = 0; i < V; ++i) {
    vf value = f.s.is_log ? v[i] - rest : v[i] * share;
    if (keep) value = select(allowed(i), value, all(f.s.is_log ? -kInf : 0.f));
    i < V - 1 ? store(to + i * W, value) : store_part(to + i * W, last, value);
  }
  return total;
}

float normalise_short_row(const Forward& f, const float* x, const float* bias, const uint8_t* keep, int64_t n, float* to) {
  switch ((n + W - 1) / W) {
    case 1: return normalise_short<1>(f, x, bias, keep, n, to);
    case 2: return normalise_short<2>(f, x, bias, keep, n, to);
    case 3: return normalise_short<3>(f, x, bias, keep, n, to);
    case 4: return normalise_short<4>(f, x, bias, keep, n, to);
    case 5: return normalise_short<5>(f, x, bias, keep, n, to);
    case 6: return normalise_short<6>(f, x, bias, keep, n, to);
    case 7: return normalise_short<7>(f, x, bias, keep, n, to);
    default: return normalise_short<8>(f, x, bias, keep, n, to);
  }
}

// A row before dropout: to[i] of key keys.start + i. Keys become the whole row where it has none and all of it gets a value.
void normalise_row(const Forward& f, const Place& p, Allowed& keys, const Rooms& rooms, float* to) {
  const Softmax& s = f.s;
  const int64_t n = keys.end - keys.start;
  const float outside = s.is_log ? -kInf : 0.f;
  double total = 0.0;
  float top = 0.f;
  if (n && n <= kShort * W) {
    const float* x = columns_of(s.x, p, keys.start, n, rooms.values);
    const float* bias = s.bias.data ? columns_of(s.bias, p, keys.start, n, rooms.others) : nullptr;
    if (normalise_short_row(f, x, bias, keys.bytes ? keys.bytes + keys.start : nullptr, n, to) != 0.f) return;
  } else if (n) {
    const float largest = scores_of(s, p, keys, rooms, to);
    top = largest == -kInf ? 0.f : largest;
    total = s.is_log ? exponentials<false>(to, n, top) : exponentials<true>(to, n, top);
  }
  if (total == 0.0) {
    if (f.of_empty != outside) keys = {0, s.sizes.kv_len, nullptr};
    fill_row(reinterpret_cast<char*>(to), kFloat, 1, keys.end - keys.start, f.of_empty);
  } else if (!(total < kInf)) {
    for (int64_t j = 0; j < n; ++j) to[j] = keys(keys.start + j) ? kNaN : outside;
  } else if (s.is_log) {
    const float rest = static_cast<float>(log(total));
    walk(
        n, [&](int64_t j, int) { store(to + j, load(to + j) - top - rest); },
        [&](int64_t j, int64_t count) { store_part(to + j, count, load_part(to + j, count, 0.f) - top - rest); });
  } else {
    const float share = 1.f / static_cast<float>(total);
    walk(
        n, [&](int64_t j, int) { store(to + j, load(to + j) * share); },
        [&](int64_t j, int64_t count) { store_part(to + j, count, load_part(to + j, count, 0.f) * share); });
  }
}

void forward_row(const Forward& f, const Place& p, const Rooms& rooms) {
  const Softmax& s = f.s;
  Allowed keys = allowed_of(s.mask, p, s.sizes.kv_len, rooms.bytes);
  const float outside = s.is_log ? -kInf : 0.f;
  const bool in_place = is_plain(s.out) && !s.dropout.seed;
  // A row without keys that gets values gets them from its first column on.
  const int64_t start = s.is_uniform ? 0 : keys.start;
  if (in_place && keys.start == start) {
    normalise_row(f, p, keys, rooms, reinterpret_cast<float*>(row_at(s.out, p)) + start);
    return put_outside(s.out, p, keys, s.sizes.kv_len, outside);
  }
  normalise_row(f, p, keys, rooms, rooms.values);
  const int64_t n = keys.end - keys.start;
  if (s.dropout.seed) {
    put(s.probs, p, keys.start, n, rooms.values);
    put_outside(s.probs, p, keys, s.sizes.kv_len, outside);
    const float* factors = dropout_row(s.dropout, p.dims[0], p.dims[1], p.dims[2], keys.start, n, rooms.factors);
    for (int64_t j = 0; j < n; ++j) rooms.values[j] *= factors[j];
  }
  put(s.out, p, keys.start, n, rooms.values);
  put_outside(s.out, p, keys, s.sizes.kv_len, outside);
}

template <int S>
void normalise_lanes(const Forward& f, const float* x, const uint8_t* ok, float* to, int64_t n) {
  f.s.is_log ? normalise<S, true>(x, ok, to, n, f.of_empty) : normalise<S, false>(x, ok, to, n, f.of_empty);
}

void normalise_block(const Forward& f, const float* x, const uint8_t* ok, float* to, int64_t n) {
  switch (f.lanes) {
    case 1: return normalise_lanes<1>(f, x, ok, to, n);
    case 2: return normalise_lanes<2>(f, x, ok, to, n);
    case 4: return normalise_lanes<4>(f, x, ok, to, n);
#if defined(__AVX2__)
    case 8: return normalise_lanes<8>(f, x, ok, to, n);
#endif
#if defined(__AVX512F__)
    case 16: return normalise_lanes<16>(f, x, ok, to, n);
#endif
    default: return;
  }
}

// Rows that lie in memory as vectors take them, scores and result.
void forward_in_place(const Forward& f, const Place& first, int64_t rows) {
  const Softmax& s = f.s;
  const int64_t n = rows * f.lanes, whole = n / W * W;
  const float* x = reinterpret_cast<const float*>(row_at(s.x, first));
  float* to = reinterpret_cast<float*>(row_at(s.out, first));
  const uint8_t* ok = keep_of(s.mask, first);
  normalise_block(f, x, ok, to, whole);
  if (whole == n) return;
  float last[W] = {}, values[W];
  uint8_t bytes[W] = {};
  for (int64_t j = whole; j < n; ++j) last[j - whole] = x[j], bytes[j - whole] = !ok || ok[j];
  normalise_block(f, last, bytes, values, W);
  memcpy(to + whole, values, static_cast<size_t>(n - whole) * 4);
}

void forward_block(const Forward& f, const Block& block, bool dense, BlockRooms& rooms) {
  const Softmax& s = f.s;
  const int64_t kv_len = s.sizes.kv_len;
  block_scores(s, f.order, block, dense, rooms);
  const uint8_t* ok = block_bytes(s, f.order, block, true, rooms.bytes);
  normalise_block(f, rooms.a, ok, rooms.c, block.end());
  if (s.dropout.seed) {
    scatter(rooms.c, f.order, block, kv_len, s.probs, is_dense(s.probs, s.sizes));
    block_factors(s.dropout, f.order, block, kv_len, rooms.b);
    for (int64_t j = 0; j < block.size(); ++j) rooms.c[j] *= rooms.b[j];
  }
  scatter(rooms.c, f.order, block, kv_len, s.out, is_dense(s.out, s.sizes));
}

void forward_thin(const Forward& f, int64_t first, int64_t last) {
  const Softmax& s = f.s;
  const bool dense = is_dense(s.x, s.sizes);
  const bool in_place = f.lanes == s.sizes.kv_len && dense && s.x.dtype == kFloat && s.scale == 1.0 && !s.bias.data && !s.dropout.seed &&
                        is_dense(s.out, s.sizes) && is_dense_keep(s.mask, s.sizes);
  if (in_place) return forward_in_place(f, f.order.at(first), last - first);
  BlockRooms rooms;
  const int64_t step = kBlockLanes / f.lanes;
  for (int64_t r = first; r < last; r += step) forward_block(f, {f.order.at(r), smaller_of(step, last - r), f.lanes}, dense, rooms);
}

void forward_tasks(void* context, int64_t worker) {
  Forward& f = *static_cast<Forward*>(context);
  Rooms rooms;
  if (!f.lanes && !rooms.take(f.s.sizes.kv_len)) {
    __atomic_store_n(&f.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t task; (task = f.tasks.take(worker)) >= 0;) {
    const int64_t first = task * f.step, last = smaller_of(first + f.step, f.order.count());
    if (f.lanes) {
      forward_thin(f, first, last);
      continue;
    }
    touch_rows(f.s.out, f.order, first, last, f.s.sizes.kv_len);
    Place p = f.order.at(first);
    for (int64_t r = first; r < last; ++r, f.order.advance(p)) forward_row(f, p, rooms);
  }
}

}  // namespace

namespace FUSED_ATTN_ISA {
int softmax_fwd(const Softmax& s);
}

int FUSED_ATTN_ISA::softmax_fwd(const Softmax& s) {
  const bool outer[3] = {};
  const Order order(s.sizes, outer);
  const int64_t step = larger_of(1, kTaskElements / s.sizes.kv_len), count = (order.count() + step - 1) / step;
  const int64_t threads = threads_for(s.threads, count);
  Forward f{s, order, Tasks(count, threads), step, lanes_of(s.sizes.kv_len), of_empty_rows(s), 0};
  parallel(threads, forward_tasks, &f);
  return f.failed ? kNoMemory : kDone;
}

}  // namespace fused_attn::cpu
