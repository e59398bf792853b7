// Masked softmax, backward: from what arrives at probabilities (or their logarithms) to gradients of the scores and of the bias.
#include <cstdlib>

#include "cpu/softmax_rows.h"
#include "cpu/softmax_thin.h"

namespace fused_attn::cpu {
namespace {

// Units of rows whose shared bias gradient is summed up one after another: enough for many threads to share the work, and few enough that
// their sums take no more room than the scores.
constexpr int64_t kUnits = 16;
constexpr int64_t kUnitRows = 4;

// How the gradient of the bias is made. Rows with the same outer index share their part of it: `columns` numbers, summed up in double over
// units of rows in order. With one unit per outer index it writes the gradient itself; else `partials` [outer][units][columns] are added up
// in order.
struct Shared {
  bool exists;
  int64_t units, columns;
  double* partials;
};

struct Backward {
  const Softmax& s;
  Order order;
  Tasks tasks;
  int64_t step;   // units of a task
  int64_t count;  // of all units
  Shared shared;
  int lanes;
  bool dense;
  float of_empty;  // as it comes out of storage
  int failed;
};

// Whether a row without keys gets values, so that it looks like a row whose scores are equal; then the scores decide.
bool may_be_empty(const Backward& f, const float* result) { return f.s.is_uniform && result[0] == f.of_empty; }

bool has_no_scores(const Softmax& s, const Place& p, const Allowed& keys, const Rooms& rooms) {
  const int64_t n = keys.end - keys.start;
  if (n == 0) return true;
  const float top = scores_of(s, p, keys, rooms, rooms.values);
  return exponentials<false>(rooms.values, n, top == -kInf ? 0.f : top) == 0.0;
}

// Sum of a[j] * b[j], or of a[j] without b; NaN or infinite where an addend is.
double sum_over(const float* a, const float* b, int64_t n) {
  double total = 0.0;
  for (int64_t from = 0; from < n; from += kSumElements) {
    const float *x = a + from, *y = b ? b + from : nullptr;
    vf sum[2] = {};
    walk(
        smaller_of(kSumElements, n - from), [&](int64_t j, int turn) { sum[turn] += y ? load(x + j) * load(y + j) : load(x + j); },
        [&](int64_t j, int64_t count) {
          const vf v = load_part(x + j, count, 0.f);
          sum[1] += y ? v * load_part(y + j, count, 0.f) : v;
        });
    total += static_cast<double>(sum_of(sum[0] + sum[1]));
  }
  return total;
}

// ds [whole vectors of n] of probabilities p and what arrives, g [n]; NaN that arrives at a masked element goes nowhere.
void differentiate_row(const Allowed& keys, const float* p, const float* g, int64_t n, float* ds) {
  float inner = static_cast<float>(sum_over(g, p, n));
  if (inner - inner == 0.f) {
    return walk(
        n, [&](int64_t j, int) { store(ds + j, load(p + j) * (load(g + j) - inner)); },
        [&](int64_t j, int64_t count) { store(ds + j, load_part(p + j, count, 0.f) * (load_part(g + j, count, 0.f) - inner)); });
  }
  bool is_empty = true;
  double total = 0.0;
  for (int64_t j = 0; j < n; ++j) {
    if (!keys(keys.start + j)) continue;
    total += static_cast<double>(g[j] * p[j]);
    is_empty &= p[j] == 0.f;
  }
  inner = static_cast<float>(total);
  for (int64_t j = 0; j < n; ++j) ds[j] = is_empty || !keys(keys.start + j) ? 0.f : p[j] * (g[j] - inner);
}

// The same of logarithms; g is written to.
void differentiate_log_row(const Allowed& keys, const float* logs, float* g, int64_t n, float* ds) {
  if (keys.bytes)
    for (int64_t j = 0; j < n; ++j) g[j] = keys.bytes[keys.start + j] ? g[j] : 0.f;
  const float inner = static_cast<float>(sum_over(g, nullptr, n));
  vf some{};
  walk(
      n,
      [&](int64_t j, int) {
        const vf p = exp_of(load(logs + j));
        some += p;
        store(ds + j, load(g + j) - p * inner);
      },
      [&](int64_t j, int64_t count) {
        const vf p = exp_of(load_part(logs + j, count, -kInf));
        some += p;
        store(ds + j, load_part(g + j, count, 0.f) - p * inner);
      });
  const bool is_empty = sum_of(some) == 0.f;
  if (!is_empty && inner - inner == 0.f) return;
  for (int64_t i = 0; i < n; ++i) ds[i] = is_empty || !keys(keys.start + i) ? 0.f : ds[i];
}

// A row of gradients before the scale, in rooms.third, zeros where masked.
void row_gradient(const Backward& f, const Place& p, const Rooms& rooms) {
  const Softmax& s = f.s;
  const int64_t kv_len = s.sizes.kv_len;
  float* ds = rooms.third;
  const Allowed keys = allowed_of(s.mask, p, kv_len, rooms.bytes);
  const int64_t n = keys.end - keys.start;
  float first;
  load_row(row_at(s.result, p), s.result.dtype, 1, 1, &first);
  if (n == 0 || (may_be_empty(f, &first) && has_no_scores(s, p, keys, rooms)))
    return fill_row(reinterpret_cast<char*>(ds), kFloat, 1, kv_len, 0.f);
  const float* result = columns_of(s.result, p, keys.start, n, rooms.values);
  const float* g = columns_of(s.dout, p, keys.start, n, rooms.others);
  if (s.dropout.seed) {
    const float* factors = dropout_row(s.dropout, p.dims[0], p.dims[1], p.dims[2], keys.start, n, rooms.factors);
    for (int64_t j = 0; j < n; ++j) rooms.others[j] = g[j] * factors[j];
    g = rooms.others;
  }
  if (s.is_log) {
    if (g != rooms.others) memcpy(rooms.others, g, static_cast<size_t>(n) * 4);
    differentiate_log_row(keys, result, rooms.others, n, ds + keys.start);
  } else {
    differentiate_row(keys, result, g, n, ds + keys.start);
  }
  memset(ds, 0, static_cast<size_t>(keys.start) * 4);
  memset(ds + keys.end, 0, static_cast<size_t>(kv_len - keys.end) * 4);
}

// Gradients of one row's scaled and biased scores to where they go.
void put_row(const Backward& f, const Place& p, const float* ds, double* sums, float* room) {
  const Softmax& s = f.s;
  const int64_t kv_len = s.sizes.kv_len;
  if (sums && f.shared.columns == 1) {
    sums[0] += sum_over(ds, nullptr, kv_len);
  } else if (sums) {
    for (int64_t j = 0; j < kv_len; ++j) sums[j] += static_cast<double>(ds[j]);
  } else if (s.dbias.data) {
    store_row(row_at(s.dbias, p), s.dbias.dtype, s.dbias.col, kv_len, ds);
  }
  if (!s.dx.data) return;
  const float scale = static_cast<float>(s.scale);
  float* to = is_plain(s.dx) ? reinterpret_cast<float*>(row_at(s.dx, p)) : room;
  walk(
      kv_len, [&](int64_t j, int) { store(to + j, load(ds + j) * scale); },
      [&](int64_t j, int64_t count) { store_part(to + j, count, load(ds + j) * scale); });
  if (to == room) store_row(row_at(s.dx, p), s.dx.dtype, s.dx.col, kv_len, to);
}

void backward_rows(const Backward& f, int64_t first, int64_t last, double* sums, const Rooms& rooms) {
  if (f.s.dx.data) touch_rows(f.s.dx, f.order, first, last, f.s.sizes.kv_len);
  Place p = f.order.at(first);
  for (int64_t r = first; r < last; ++r, f.order.advance(p)) {
    row_gradient(f, p, rooms);
    put_row(f, p, rooms.third, sums, rooms.values);
  }
}

template <int S>
void differentiate_lanes(bool is_log, const Arriving& a, float* ds, int64_t n, float factor) {
  is_log ? differentiate<S, true>(a, ds, n, factor) : differentiate<S, false>(a, ds, n, factor);
}

void differentiate_block(const Backward& f, const Arriving& a, float* ds, int64_t n, float factor) {
  switch (f.lanes) {
    case 1: return differentiate_lanes<1>(f.s.is_log, a, ds, n, factor);
    case 2: return differentiate_lanes<2>(f.s.is_log, a, ds, n, factor);
    case 4: return differentiate_lanes<4>(f.s.is_log, a, ds, n, factor);
#if defined(__AVX2__)
    case 8: return differentiate_lanes<8>(f.s.is_log, a, ds, n, factor);
#endif
#if defined(__AVX512F__)
    case 16: return differentiate_lanes<16>(f.s.is_log, a, ds, n, factor);
#endif
    default: return;
  }
}

// Rows that lie in memory as vectors take them.
void backward_in_place(const Backward& f, const Place& first, int64_t rows) {
  const Softmax& s = f.s;
  const int64_t n = rows * f.lanes, whole = n / W * W;
  const float scale = static_cast<float>(s.scale);
  const float* result = reinterpret_cast<const float*>(row_at(s.result, first));
  const float* g = reinterpret_cast<const float*>(row_at(s.dout, first));
  float* to = reinterpret_cast<float*>(row_at(s.dx, first));
  const uint8_t* ok = keep_of(s.mask, first);
  differentiate_block(f, {result, g, nullptr, ok}, to, whole, scale);
  if (whole == n) return;
  float r[W] = {}, arriving[W] = {}, values[W];
  uint8_t bytes[W] = {};
  for (int64_t j = whole, i = 0; j < n; ++j, ++i) r[i] = result[j], arriving[i] = g[j], bytes[i] = !ok || ok[j];
  differentiate_block(f, {r, arriving, nullptr, bytes}, values, W, scale);
  memcpy(to + whole, values, static_cast<size_t>(n - whole) * 4);
}

void backward_block(const Backward& f, const Block& block, double* sums, BlockRooms& rooms) {
  const Softmax& s = f.s;
  const int64_t kv_len = s.sizes.kv_len;
  if (s.is_uniform) block_scores(s, f.order, block, f.dense && is_dense(s.x, s.sizes), rooms);
  const uint8_t* ok = block_bytes(s, f.order, block, f.dense, rooms.bytes);
  gather(s.result, f.order, block, kv_len, f.dense && is_dense(s.result, s.sizes), rooms.b);
  gather(s.dout, f.order, block, kv_len, f.dense && is_dense(s.dout, s.sizes), rooms.c);
  if (s.dropout.seed) {
    block_factors(s.dropout, f.order, block, kv_len, rooms.d);
    for (int64_t j = 0; j < block.size(); ++j) rooms.c[j] *= rooms.d[j];
  }
  differentiate_block(f, {rooms.b, rooms.c, s.is_uniform ? rooms.a : nullptr, ok}, rooms.d, block.end(), 1.f);
  if (sums) {
    double row_sum = 0.0;
    for (int64_t i = 0; i < block.rows; ++i)
      for (int64_t j = 0; j < kv_len; ++j)
        if (f.shared.columns == 1) row_sum += static_cast<double>(rooms.d[i * f.lanes + j]);
        else sums[j] += static_cast<double>(rooms.d[i * f.lanes + j]);
    if (f.shared.columns == 1) sums[0] += row_sum;
  } else if (s.dbias.data) {
    scatter(rooms.d, f.order, block, kv_len, s.dbias, f.dense && is_dense(s.dbias, s.sizes));
  }
  if (!s.dx.data) return;
  const float scale = static_cast<float>(s.scale);
  for (int64_t j = 0; j < block.size(); ++j) rooms.d[j] *= scale;
  scatter(rooms.d, f.order, block, kv_len, s.dx, f.dense && is_dense(s.dx, s.sizes));
}

void backward_thin(const Backward& f, int64_t first, int64_t last, double* sums) {
  const Softmax& s = f.s;
  const bool in_place = f.lanes == s.sizes.kv_len && f.dense && s.dx.data && !s.dbias.data && !s.dropout.seed && !s.is_uniform &&
                        s.result.dtype == kFloat && s.dout.dtype == kFloat && is_dense(s.result, s.sizes) && is_dense(s.dout, s.sizes) &&
                        is_dense(s.dx, s.sizes) && is_dense_keep(s.mask, s.sizes);
  if (in_place) return backward_in_place(f, f.order.at(first), last - first);
  BlockRooms rooms;
  const int64_t step = kBlockLanes / f.lanes;
  for (int64_t r = first; r < last; r += step) backward_block(f, {f.order.at(r), smaller_of(step, last - r), f.lanes}, sums, rooms);
}

// The rows of one unit; where they share a part of the bias gradient, that part.
void backward_unit(const Backward& f, int64_t unit, const Rooms& rooms, double* sums) {
  const int64_t inner = f.order.inner(), outer = unit / f.shared.units, split = unit % f.shared.units;
  const int64_t first = outer * inner + inner * split / f.shared.units, last = outer * inner + inner * (split + 1) / f.shared.units;
  const bool is_last = f.shared.units == 1;
  if (f.shared.exists) {
    sums = is_last ? sums : f.shared.partials + unit * f.shared.columns;
    memset(sums, 0, static_cast<size_t>(f.shared.columns) * 8);
  }
  double* shared = f.shared.exists ? sums : nullptr;
  f.lanes ? backward_thin(f, first, last, shared) : backward_rows(f, first, last, shared, rooms);
  if (!f.shared.exists || !is_last) return;
  char* to = row_at(f.s.dbias, f.order.at(first));
  for (int64_t j = 0; j < f.shared.columns; ++j) store_one(to + 4 * j * f.s.dbias.col, kFloat, static_cast<float>(sums[j]));
}

void backward_tasks(void* context, int64_t worker) {
  Backward& f = *static_cast<Backward*>(context);
  Rooms rooms;
  if (!rooms.take(f.s.sizes.kv_len)) {
    __atomic_store_n(&f.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  for (int64_t task; (task = f.tasks.take(worker)) >= 0;)
    for (int64_t unit = task * f.step; unit < smaller_of((task + 1) * f.step, f.count); ++unit) backward_unit(f, unit, rooms, rooms.sums);
}

void add_up(const Backward& f) {
  const Shared& shared = f.shared;
  for (int64_t outer = 0; outer * f.order.inner() < f.order.count(); ++outer) {
    char* to = row_at(f.s.dbias, f.order.at(outer * f.order.inner()));
    const double* first = shared.partials + outer * shared.units * shared.columns;
    for (int64_t j = 0; j < shared.columns; ++j) {
      double total = 0.0;
      for (int64_t u = 0; u < shared.units; ++u) total += first[u * shared.columns + j];
      store_one(to + 4 * j * f.s.dbias.col, kFloat, static_cast<float>(total));
    }
  }
}

}  // namespace

namespace FUSED_ATTN_ISA {
int softmax_bwd(const Softmax& s);
}

int FUSED_ATTN_ISA::softmax_bwd(const Softmax& s) {
  const int64_t sizes[3] = {s.sizes.batch, s.sizes.heads, s.sizes.q_len}, strides[3] = {s.dbias.batch, s.dbias.head, s.dbias.row};
  const int64_t kv_len = s.sizes.kv_len;
  bool outer[3], shared = s.dbias.data && kv_len > 1 && s.dbias.col == 0;
  for (int d = 0; d < 3; ++d) {
    outer[d] = s.dbias.data && (strides[d] != 0 || sizes[d] == 1);
    shared |= s.dbias.data && !outer[d];
  }
  if (!shared) outer[0] = outer[1] = outer[2] = false;
  const Order order(s.sizes, outer);
  const int64_t inner = order.inner(), groups = order.count() / inner;
  const int64_t rows = larger_of(1, kTaskElements / kv_len);
  int64_t units = 1;
  if (!shared) units = (inner + rows - 1) / rows;
  else if (groups < kUnits) units = larger_of(1, smaller_of(inner / kUnitRows, kUnits / groups));
  const int64_t count = groups * units, step = shared ? larger_of(1, rows * units / inner) : 1, tasks = (count + step - 1) / step;
  const int64_t columns = s.dbias.col == 0 ? 1 : kv_len, threads = threads_for(s.threads, tasks);
  double* partials = nullptr;
  if (shared && units > 1) {
    partials = static_cast<double*>(malloc(static_cast<size_t>(count * columns) * 8));
    if (!partials) return kNoMemory;
  }
  float of_empty = of_empty_rows(s);
  char stored[8];
  store_one(stored, s.result.dtype, of_empty);
  of_empty = load_one(stored, s.result.dtype);
  Backward f{s, order, Tasks(tasks, threads), step, count, {shared, units, columns, partials}, lanes_of(kv_len), !shared, of_empty, 0};
  parallel(threads, backward_tasks, &f);
  if (partials && !f.failed) add_up(f);
  free(partials);
  return f.failed ? kNoMemory : kDone;
}

}  // namespace fused_attn::cpu
