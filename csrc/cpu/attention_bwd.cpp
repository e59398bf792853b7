// Backward: every item is a range of query rows of one head against all keys they reach. dq belongs to the item alone; what items share
// (dk, dv, sums over queries) is made in parts that are added up in a fixed order, so that nothing depends on the threads.
#include "cpu/attention.h"
#include "cpu/gradient_tile.h"
#include "cpu/ordered.h"
#include "cpu/region.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kPartRows = 512;  // query rows of an item, where a head has more
constexpr int64_t kMostParts = 32;  // items of a sequence beyond which heads are not cut further
// Keys that all rows of an item pass by before the next ones come: their k, v, dk and dv (head size 64: 1 MB) stay in the second-level
// cache. 512 and 2048 cost 2 and 5 %.
constexpr int64_t kChunkTiles = 8;
constexpr int64_t kWorthThread = 512;  // scores for which one more thread is called: 1024 take one 15.9 us and two that are awake 9.5

struct Plan {
  explicit Plan(const Attention& call) : call(call) {
    const Sizes& s = call.sizes;
    group = s.heads / s.kv_heads;
    parts = larger_of(1, smaller_of(s.q_len / kPartRows, kMostParts / s.heads));
    rows = (s.q_len + parts - 1) / parts;
    rows = (rows + kGradientRows - 1) / kGradientRows * kGradientRows;
    parts = (s.q_len + rows - 1) / rows;
    key_width = call.dk.data ? padded(s.head_dim) : 0;
    width = key_width + (call.dv.data ? padded(s.value_dim) : 0);
    for (int64_t m = 0; m < call.mod_count; ++m) columns += call.mods[m].col_grad != nullptr;
  }

  // Whether an item has a key head to itself, and its dk and dv need not be added to anything.
  bool is_whole() const { return group * parts == 1; }

  const Attention& call;
  int64_t group, parts, rows, key_width, width, columns = 0;
};

struct Sums {
  OrderedSums keys, columns, weights;

  bool begin(const Plan& plan) {
    const Sizes& s = plan.call.sizes;
    return (!plan.width || plan.is_whole() || keys.begin(s.batch * s.kv_heads, plan.group * plan.parts, s.kv_len, plan.width)) &&
           (!plan.columns || columns.begin(s.batch * s.heads, plan.parts, plan.columns * s.kv_len, 1)) &&
           (!plan.call.weight_grad || weights.begin(s.batch * s.heads, plan.parts, s.head_dim, 1));
  }
};

class Worker {
 public:
  Worker(const Plan& plan, Sums& sums, char* memory) : plan_(plan), call_(plan.call), sizes_(plan.call.sizes), sums_(sums), arena_(memory) {
    tile_.reserve(arena_, call_, plan.rows);
    if (call_.dq.data && !call_.weight.data) keys_.reserve(arena_, call_.k, sizes_.kv_len, sizes_.head_dim);
    dq_ = arena_.take<float>(plan.rows * padded(sizes_.head_dim));
    if (plan.is_whole()) whole_ = reinterpret_cast<Part*>(arena_.take<char>(OrderedSums::bytes(sizes_.kv_len, plan.width)));
    if (call_.weight.data) {
      spare_keys_ = arena_.take<float>(kTile * padded(sizes_.head_dim));
      spare_weight_ = arena_.take<float>(padded(sizes_.head_dim));
      room_ = arena_.take<float>(sizes_.head_dim * W);
    }
  }

  size_t bytes() const { return static_cast<size_t>(arena_.used()); }
  bool failed() const { return failed_; }

  void run(Tasks& tasks, int64_t worker) {
    const int64_t of_pair = plan_.group * plan_.parts;
    for (int64_t task; !failed_ && (task = tasks.take(worker)) >= 0;) {
      if (task / of_pair != pair_) {
        pair_ = task / of_pair;
        b_ = pair_ / sizes_.kv_heads;
        const int64_t kv_head = pair_ % sizes_.kv_heads;
        tile_.begin_pair(b_, kv_head);
        if (call_.dq.data && !call_.weight.data) keys_.begin({&call_.k, b_, kv_head, sizes_.kv_len, sizes_.head_dim});
      }
      h_ = pair_ % sizes_.kv_heads * plan_.group + task % of_pair / plan_.parts;
      run_item(task % of_pair, task % plan_.parts);
    }
  }

 private:
  void run_item(int64_t number, int64_t part) {
    r0_ = part * plan_.rows;
    r1_ = smaller_of(sizes_.q_len, r0_ + plan_.rows);
    reach();
    Part* const keys = !plan_.width ? nullptr
                       : whole_     ? OrderedSums::clear(whole_, first_, last_, plan_.width)
                                    : sums_.keys.make(first_, last_);
    Part* const columns = plan_.columns ? sums_.columns.make(0, plan_.columns * sizes_.kv_len) : nullptr;
    Part* const weights = call_.weight_grad ? sums_.weights.make(0, sizes_.head_dim) : nullptr;
    failed_ = (plan_.width && !keys) || (plan_.columns && !columns) || (call_.weight_grad && !weights);
    if (!failed_) {
      to_keys_ = keys ? keys->data() : nullptr;
      to_columns_ = columns ? columns->data() : nullptr;
      to_weight_ = weights ? weights->data() : spare_weight_;
      differentiate();
    }
    const int64_t head = b_ * sizes_.heads + h_;
    if (keys && whole_) write_keys(keys);
    if (keys && !whole_)
      if (Part* whole = sums_.keys.add(pair_, number, keys)) {
        write_keys(whole);
        free(whole);
      }
    if (columns)
      if (Part* whole = sums_.columns.add(head, part, columns)) write_columns(whole, head);
    if (weights)
      if (Part* whole = sums_.weights.add(head, part, weights)) {
        memcpy(call_.weight_grad + head * sizes_.head_dim, whole->data(), static_cast<size_t>(sizes_.head_dim) * 4);
        free(whole);
      }
  }

  // The keys that the item's rows reach by their intervals, in whole tiles.
  void reach() {
    first_ = 0, last_ = sizes_.kv_len;
    if (!has_intervals(call_.mask)) return;
    first_ = sizes_.kv_len, last_ = 0;
    for (int64_t row = r0_; row < r1_; ++row) {
      const Interval keys = interval_of(call_.mask, b_, row, sizes_.kv_len);
      if (keys.start >= keys.end) continue;
      first_ = smaller_of(first_, keys.start);
      last_ = larger_of(last_, keys.end);
    }
    first_ = first_ < last_ ? first_ / kTile * kTile : 0;
    last_ = smaller_of(tiles_of(last_) * kTile, sizes_.kv_len);
  }

  bool writes_pairs() const {
    for (int64_t m = 0; m < call_.mod_count; ++m)
      if (is_own(call_.mods[m])) return true;
    return false;
  }

  // Whether every pair has an element of the gradient of its own; the others are attention_bwd_bias's.
  bool is_own(const Mod& mod) const {
    return mod.grad.data && (sizes_.batch == 1 || mod.grad.batch != 0) && (sizes_.heads == 1 || mod.grad.head != 0);
  }

  void differentiate() {
    memset(dq_, 0, static_cast<size_t>((r1_ - r0_) * tile_.q_row) * 4);
    tile_.begin_rows(h_, r0_, r1_ - r0_);
    // Gradients of every pair are written where nobody attends as well.
    const int64_t begin = writes_pairs() ? 0 : first_ / kTile, end = writes_pairs() ? tiles_of(sizes_.kv_len) : tiles_of(last_);
    for (int64_t chunk = begin; chunk < end; chunk += kChunkTiles)
      for (int64_t q0 = r0_; q0 < r1_; q0 += kGradientRows) {
        q0_ = q0, rows_ = smaller_of(kGradientRows, r1_ - q0);
        tile_.begin_block(q0, rows_);
        for (int64_t t = chunk; t < smaller_of(end, chunk + kChunkTiles); ++t) run_tile(t);
      }
    if (call_.dq.data) write_queries();
  }

  void run_tile(int64_t t) {
    const Kind kind = tile_.kind(t);
    if (kind == kNone) return clear_pairs(t);
    tile_.make(t, kind);
    if (call_.dv.data && call_.dout.data) {
      const Factor weights{tile_.p, 1, kTileRow};
      multiply(keys_of(t), rows_, padded(sizes_.value_dim), weights, tile_.dout, tile_.dout_row, values_at(t), plan_.width,
               kind == kMixed && tile_.dout_broken, 1, kTile);
    }
    for (int64_t m = call_.mod_count - 1, columns = plan_.columns; m >= 0; --m) {
      const Mod& mod = call_.mods[m];
      if (has_slope(mod.kind)) tile_.through(m, t);
      if (is_own(mod)) write_pairs(mod, t);
      if (mod.row_grad) add_rows(mod, t);
      if (mod.col_grad) add_columns(to_columns_ + --columns * sizes_.kv_len + t * kTile, t);
    }
    if (call_.weight.data) return add_vectors(t);
    if (call_.dk.data)
      multiply(keys_of(t), rows_, plan_.key_width, {tile_.ds, 1, kTileRow}, tile_.q, tile_.q_row, keys_at(t), plan_.width,
               kind == kMixed && tile_.q_broken, 1, kTile);
    if (call_.dq.data)
      multiply(rows_, keys_of(t), tile_.q_row, {tile_.ds, kTileRow, 1}, keys_.tile(t), keys_.stride(), queries(), tile_.q_row,
               kind == kMixed && keys_.is_broken(t), kTile, 1);
  }

  void multiply(int64_t rows, int64_t depth, int64_t width, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                bool carefully, int64_t allowed_row, int64_t allowed_step) {
    if (carefully) add_allowed(rows, depth, width, a, b, b_row, c, c_row, tile_.allowed, allowed_row, allowed_step);
    else add_product(rows, depth, width, a, b, b_row, c, c_row, false);
  }

  int64_t keys_of(int64_t t) const { return tile_.keys_of(t); }
  float* queries() { return dq_ + (q0_ - r0_) * tile_.q_row; }
  float* keys_at(int64_t t) { return to_keys_ + t * kTile * plan_.width; }
  float* values_at(int64_t t) { return keys_at(t) + plan_.key_width; }

  void add_vectors(int64_t t) {
    float* const dk = call_.dk.data ? keys_at(t) : spare_keys_;
    additive_gradients(rows_, sizes_.head_dim, tile_.q, tile_.q_row, tile_.key_panels(t), padded(keys_of(t)), keys_of(t),
                       tile_.scorer().weight(), tile_.ds, kTileRow, queries(), tile_.q_row, dk,
                       call_.dk.data ? plan_.width : padded(sizes_.head_dim), to_weight_, room_);
  }

  void clear_pairs(int64_t t) {
    float zeros[kTile] = {};
    for (int64_t m = 0; m < call_.mod_count; ++m) {
      const Matrix& grad = call_.mods[m].grad;
      for (int64_t i = 0; is_own(call_.mods[m]) && i < rows_; ++i)
        store_row(at(grad, b_, h_, q0_ + i, t * kTile), grad.dtype, grad.col, keys_of(t), zeros);
    }
  }

  void write_pairs(const Mod& mod, int64_t t) {
    for (int64_t i = 0; i < rows_; ++i)
      store_row(at(mod.grad, b_, h_, q0_ + i, t * kTile), mod.grad.dtype, mod.grad.col, keys_of(t), tile_.ds + i * kTileRow);
  }

  // Sums over the tile's keys; for slopes, times minus the distances.
  void add_rows(const Mod& mod, int64_t t) {
    float* const to = mod.row_grad + (b_ * sizes_.heads + h_) * sizes_.q_len + q0_;
    for (int64_t i = 0; i < rows_; ++i) {
      const float* const ds = tile_.ds + i * kTileRow;
      const int64_t gap = position_of(call_.mask, b_, q0_ + i) - t * kTile;
      vf s{};
      for (int64_t j = 0; j < keys_of(t); j += W) s += mod.kind == kALiBi ? load(ds + j) * -Scorer::distances(gap - j) : load(ds + j);
      to[i] += sum_of(s);
    }
  }

  void add_columns(float* to, int64_t t) {
    for (int64_t j = 0; j < keys_of(t); j += W) {
      vf s{};
      for (int64_t i = 0; i < rows_; ++i) s += load(tile_.ds + i * kTileRow + j);
      for (int64_t l = 0; l < W && j + l < keys_of(t); ++l) to[j + l] += s[l];
    }
  }

  void write_queries() {
    const float scale = call_.weight.data ? 1.f : static_cast<float>(call_.scale);
    for (int64_t row = r0_; row < r1_; ++row) write_row(call_.dq, h_, row, sizes_.head_dim, dq_ + (row - r0_) * tile_.q_row, scale);
  }

  void write_row(const Matrix& m, int64_t h, int64_t row, int64_t width, float* from, float scale) {
    if (scale != 1.f)
      for (int64_t d = 0; d < width; d += W) store(from + d, load(from + d) * scale);
    store_row(at(m, b_, h, row, 0), m.dtype, m.col, width, from);
  }

  // dk and dv of a key head, whole.
  void write_keys(Part* whole) {
    const float scale = call_.weight.data ? 1.f : static_cast<float>(call_.scale);
    const int64_t kv_head = pair_ % sizes_.kv_heads;
    for (int64_t row = 0; row < sizes_.kv_len; ++row) {
      float* const from = whole->data() + row * plan_.width;
      if (row < whole->first || row >= whole->last) memset(from, 0, static_cast<size_t>(plan_.width) * 4);
      if (call_.dv.data) write_row(call_.dv, kv_head, row, sizes_.value_dim, from + plan_.key_width, 1.f);
      if (call_.dk.data) write_row(call_.dk, kv_head, row, sizes_.head_dim, from, scale);
    }
  }

  void write_columns(Part* whole, int64_t head) {
    const float* from = whole->data();
    for (int64_t m = 0; m < call_.mod_count; ++m) {
      if (!call_.mods[m].col_grad) continue;
      memcpy(call_.mods[m].col_grad + head * sizes_.kv_len, from, static_cast<size_t>(sizes_.kv_len) * 4);
      from += sizes_.kv_len;
    }
    free(whole);
  }

  const Plan& plan_;
  const Attention& call_;
  const Sizes& sizes_;
  Sums& sums_;
  Arena arena_;
  GradientTile tile_;
  Rows keys_;
  int64_t pair_ = -1, b_ = 0, h_ = 0, r0_ = 0, r1_ = 0, q0_ = 0, rows_ = 0, first_ = 0, last_ = 0;
  float *dq_, *to_keys_ = nullptr, *to_columns_ = nullptr, *to_weight_ = nullptr;
  float *spare_keys_ = nullptr, *spare_weight_ = nullptr, *room_ = nullptr;
  Part* whole_ = nullptr;
  bool failed_ = false;
};

}  // namespace

int FUSED_ATTN_ISA::attention_bwd(const Attention& call) {
  const Plan plan(call);
  Sums sums;
  if (!sums.begin(plan)) return kNoMemory;
  return run_region<Worker>(plan, sums, call.sizes.batch * call.sizes.heads * plan.parts, kWorthThread);
}

}  // namespace fused_attn::cpu
