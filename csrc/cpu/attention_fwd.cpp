// Forward: blocks of query rows against all keys they reach. Scores of a block stay in the second-level cache as whole rows, so that every
// row has one maximum and one sum; probabilities and statistics are written on the way, from the same numbers as the output.
#include "cpu/attention.h"
#include "cpu/ordered.h"
#include "cpu/region.h"
#include "cpu/scores.h"

namespace fused_attn::cpu {
namespace {

// Floats of scores that stay in a second-level cache of 1 MB beside panels of keys and rows of values. Measured with 1 core, head size 64:
// 200, 400 and 800 KB are alike to 3 % up to 2048 keys; at 4096, 800 KB costs 6 %.
constexpr int64_t kCached = 400 * 1024 / 4;
// Query rows of a block whose rows have intervals of keys: the fewer, the less they reach together. Against 96: eight documents of 1024
// keys 0.86, windows 0.95 of the time, causal 0.98 at 1024 and 1.00 at 2048.
constexpr int64_t kNarrowRows = 48;
// Scores for which one more thread is called. 1024 of them take one thread 8.3 us and two that are awake 5.6 (head size 64).
constexpr int64_t kWorthThread = 1024;

struct Plan {
  explicit Plan(const Attention& call) : call(call) {
    const Sizes& s = call.sizes;
    group = s.heads / s.kv_heads;
    int64_t reach = s.kv_len;
    if (call.mask.left >= 0 && call.mask.right >= 0) reach = smaller_of(reach, call.mask.left + call.mask.right + kMostRows);
    // A reach begins anywhere in its first tile.
    s_row = smaller_of(tiles_of(s.kv_len), tiles_of(reach) + 1) * kTile + 16;
    rows = smaller_of(larger_of(kCached / s_row / kGroup * kGroup, kGroup), kMostRows);
    if (has_intervals(call.mask)) rows = smaller_of(rows, kNarrowRows);
    if (rows > s.q_len) rows = s.q_len;
    blocks = (s.q_len + rows - 1) / rows;
    // Column sums are summed over all blocks of a head, in parts whose number depends on the head's own size alone.
    parts = call.column_sums ? smaller_of(blocks, 8) : blocks;
  }

  const Attention& call;
  int64_t group, rows, s_row, blocks, parts;
};

// One thread's work.
class Worker {
 public:
  Worker(const Plan& plan, OrderedSums& sums, char* memory)
      : plan_(plan), call_(plan.call), sizes_(plan.call.sizes), sums_(sums), arena_(memory) {
    const int64_t tiles = tiles_of(sizes_.kv_len);
    width_ = padded(sizes_.value_dim);
    q_row_ = padded(sizes_.head_dim);
    panels_.reserve(arena_, sizes_.kv_len, sizes_.head_dim);
    values_.reserve(arena_, call_.v, sizes_.kv_len, sizes_.value_dim);
    q_ = arena_.take<float>(plan.rows * q_row_);
    out_ = arena_.take<float>(plan.rows * width_);
    top_ = arena_.take<float>(plan.rows * W);
    factor_ = arena_.take<float>(plan.rows);
    scores_ = arena_.take<float>(plan.rows * plan.s_row);
    kinds_ = arena_.take<Kind>(tiles);
    allowed_ = arena_.take<uint8_t>(kMostRows * kTile);
    room_ = arena_.take<float>(dropout_room(kTile));
    column_ = arena_.take<float>(kTile);
  }

  size_t bytes() const { return static_cast<size_t>(arena_.used()); }
  bool failed() const { return failed_; }

  void run(Tasks& tasks, int64_t worker) {
    const int64_t group_tasks = plan_.group * plan_.parts;
    for (int64_t task; (task = tasks.take(worker)) >= 0;) {
      const int64_t pair = task / group_tasks, part = task % plan_.parts;
      h_ = pair % sizes_.kv_heads * plan_.group + task % group_tasks / plan_.parts;
      if (pair != pair_) {
        pair_ = pair;
        b_ = pair / sizes_.kv_heads;
        panels_.begin({&call_.k, b_, pair % sizes_.kv_heads, sizes_.kv_len, sizes_.head_dim});
        values_.begin({&call_.v, b_, pair % sizes_.kv_heads, sizes_.kv_len, sizes_.value_dim});
      }
      scorer_.begin(call_, b_, h_);
      run_part(part);
    }
  }

 private:
  void run_part(int64_t part) {
    Part* sums = call_.column_sums ? sums_.make(0, sizes_.kv_len) : nullptr;
    if (call_.column_sums && !sums) return void(failed_ = true);
    columns_ = sums ? sums->data() : nullptr;
    for (int64_t block = plan_.blocks * part / plan_.parts; block < plan_.blocks * (part + 1) / plan_.parts; ++block) {
      q0_ = block * plan_.rows;
      rows_ = smaller_of(plan_.rows, sizes_.q_len - q0_);
      run_block();
    }
    if (!sums) return;
    const int64_t head = b_ * sizes_.heads + h_;
    if (Part* whole = sums_.add(head, part, sums)) {
      memcpy(call_.column_sums + head * sizes_.kv_len, whole->data(), static_cast<size_t>(sizes_.kv_len) * 4);
      free(whole);
    }
  }

  void run_block() {
    copy_rows(call_.q, b_, h_, q0_, rows_, sizes_.head_dim, q_);
    mask_.begin(call_.mask, b_, h_, q0_, rows_, sizes_.kv_len);
    first_ = mask_.first() / kTile;
    last_ = mask_.first() < mask_.last() ? tiles_of(mask_.last()) : first_;
    for (int64_t i = 0; i < rows_ * W; ++i) top_[i] = -kInf;
    for (int64_t t = first_; t < last_; ++t) {
      kinds_[t] = mask_.kind(t * kTile, keys_of(t));
      if (kinds_[t] != kNone) score(t);
    }
    for (int64_t i = 0; call_.probs.data && i < rows_; ++i)
      touch_pages(at(call_.probs, b_, h_, q0_ + i, 0), call_.probs.dtype, call_.probs.col, sizes_.kv_len);
    for (int64_t i = 0; i < rows_; ++i) normalise(i);
    if (call_.dropout.seed) drop();
    multiply();
    for (int64_t i = 0; i < rows_; ++i) write_out(i);
  }

  int64_t keys_of(int64_t t) const { return smaller_of(kTile, sizes_.kv_len - t * kTile); }
  float* scores_at(int64_t i, int64_t t) { return scores_ + i * plan_.s_row + (t - first_) * kTile; }
  int64_t row_number(int64_t i) const { return (b_ * sizes_.heads + h_) * sizes_.q_len + q0_ + i; }

  // Scores of a tile, -inf where masked, and the rows' maxima so far.
  void score(int64_t t) {
    if (kinds_[t] == kMixed) mask_.bytes(t * kTile, keys_of(t), allowed_);
    for (int64_t i = 0; i < rows_; i += kGroup) score_rows(i, smaller_of(kGroup, rows_ - i), t, allowed_ + i * kTile);
  }

  void score_rows(int64_t i0, int64_t rows, int64_t t, const uint8_t* allowed) {
    const int64_t n = keys_of(t);
    const bool fused = scorer_.is_plain() && kinds_[t] == kFull && !call_.scores.data;
    scorer_.score({q0_ + i0, rows, q_ + i0 * q_row_, q_row_, panels_.tile(t), t * kTile, n}, scores_at(i0, t), plan_.s_row,
                  fused ? top_ + i0 * W : nullptr, {{}, false});
    if (fused) return;
    for (int64_t i = i0; i < i0 + rows; ++i, allowed += kTile) {
      float* const s = scores_at(i, t);
      vf most = load(top_ + i * W);
      for (int64_t j = 0; j < n; j += W) {
        vf x = load(s + j);
        if (kinds_[t] == kMixed) store(s + j, x = select(is_set(allowed + j), x, all(-kInf)));
        most = larger(most, x);
      }
      store(top_ + i * W, most);
      if (call_.scores.data) store_row(at(call_.scores, b_, h_, q0_ + i, t * kTile), call_.scores.dtype, call_.scores.col, n, s);
    }
  }

  // Turns a row of scores into exponentials; writes its statistics, and its probabilities where they are wanted.
  void normalise(int64_t i) {
    const int64_t r = row_number(i);
    if (call_.scores.data) fill_skipped(call_.scores, i, -kInf);
    if (call_.is_sigmoid) return weigh(i, r);
    const float most = largest_of(load(top_ + i * W));
    float top = most, sum = 0.f;
    const float sink = call_.sinks.data ? load_one(at(call_.sinks, 0, h_, 0, 0), call_.sinks.dtype) : -kInf;
    if (!(sink <= top)) top = sink == sink && top == top ? sink : kNaN;
    // Of a row without scores the sink, be it NaN, makes no exponential.
    const vf base = all(most == -kInf ? 0.f : top);
    vf even{}, odd{}, mass{}, moments{};
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      float* const s = scores_at(i, t);
      const int64_t n = padded(keys_of(t));
      if (call_.entropy)
        for (int64_t j = 0; j < n; j += W) {
          const vf x = load(s + j) - base;
          const vf y = small_exp_of(x);
          mass += y;
          moments += select(x > -kInf, x * y, vf{});
        }
      int64_t j = 0;
      for (; j + 2 * W <= n; j += 2 * W) {
        const vf x = exp_of(load(s + j) - base), y = exp_of(load(s + j + W) - base);
        even += x;
        odd += y;
        store(s + j, x);
        store(s + j + W, y);
      }
      if (j < n) {
        const vf x = exp_of(load(s + j) - base);
        even += x;
        store(s + j, x);
      }
    }
    const float keys = sum_of(even + odd);
    // Without scores the sum is 0, also where a sink has all the weight.
    sum = most == -kInf && keys == 0.f ? 0.f : keys + (sink == -kInf ? 0.f : std::exp(sink - top));
    const bool broken = sum != sum;
    factor_[i] = sum == 0.f ? 0.f : 1.f / sum;
    // A sink without scores beside it is the row's lse; one that is infinite or NaN leaves NaN.
    if (call_.lse) keep(r, top, sum, sum != 0.f ? top + std::log(sum) : top == -kInf ? top : top + (top - top));
    if (call_.max_scores) call_.max_scores[r] = broken && has_nan(i) ? kNaN : most;
    if (broken) break_row(i);
    // Sum of p (log of the whole sum - (score - top)), where the keys' own share is less than 1 beside a sink.
    if (call_.entropy) call_.entropy[r] = sum == 0.f ? 0.f : (std::log(sum) * sum_of(mass) - sum_of(moments)) / sum;
    give_out(i, factor_[i]);
  }

  void keep(int64_t r, float top, float sum, float lse) {
    call_.top[r] = top;
    call_.sum[r] = sum;
    call_.lse[r] = lse;
  }

  // The sigmoid normaliser: every score's own weight.
  void weigh(int64_t i, int64_t r) {
    const vf bias = all(static_cast<float>(call_.sigmoid_bias));
    vf nans{};
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      float* const s = scores_at(i, t);
      for (int64_t j = 0; j < padded(keys_of(t)); j += W) {
        const vf x = load(s + j) + bias, e = exp_of(x > 0.f ? -x : x);
        store(s + j, (x > 0.f ? all(1.f) : e) / (1.f + e));
        nans += select(x == x, vf{}, all(1.f));
      }
    }
    const bool has_nans = sum_of(nans) != 0.f;
    const float most = largest_of(load(top_ + i * W));
    // A row whose scores are all -inf is an empty one.
    factor_[i] = most == -kInf && !has_nans ? 0.f : 1.f;
    if (call_.lse) keep(r, 0.f, factor_[i], -kInf);
    if (call_.max_scores) call_.max_scores[r] = has_nans ? kNaN : most;
    give_out(i, 1.f);
  }

  // Whether an allowed score of the row is NaN.
  bool has_nan(int64_t i) {
    bool found = false;
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      float s[kTile];
      scorer_.score({q0_ + i, 1, q_ + i * q_row_, q_row_, panels_.tile(t), t * kTile, keys_of(t)}, s, kTile, nullptr, {{}, false});
      uint8_t allowed[kTile];
      mask_.row(i, t * kTile, keys_of(t), allowed);
      for (int64_t j = 0; j < keys_of(t); ++j) found |= allowed[j] && s[j] != s[j];
    }
    return found;
  }

  // A row whose sum is NaN: NaN wherever it may attend, whatever its exponentials are there, and zeros elsewhere.
  void break_row(int64_t i) {
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      uint8_t allowed[kTile];
      mask_.row(i, t * kTile, keys_of(t), allowed);
      for (int64_t j = 0; j < kTile; ++j) scores_at(i, t)[j] = allowed[j] ? kNaN : 0.f;
    }
  }

  void fill_skipped(const Matrix& m, int64_t i, float x) {
    for (int64_t j = 0; j < kTile; ++j) column_[j] = x;
    for (int64_t t = 0; t < tiles_of(sizes_.kv_len); ++t)
      if (t < first_ || t >= last_ || kinds_[t] == kNone) store_row(at(m, b_, h_, q0_ + i, t * kTile), m.dtype, m.col, keys_of(t), column_);
  }

  // The row's probabilities into what is asked for.
  void give_out(int64_t i, float factor) {
    if (!call_.probs.data && !columns_) return;
    if (call_.probs.data) fill_skipped(call_.probs, i, 0.f);
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      const float* const s = scores_at(i, t);
      const int64_t n = keys_of(t);
      char* const to = call_.probs.data ? at(call_.probs, b_, h_, q0_ + i, t * kTile) : nullptr;
      float* const p = to && call_.probs.dtype == kFloat && call_.probs.col == 1 && n % W == 0 ? reinterpret_cast<float*>(to) : column_;
      for (int64_t j = 0; j < n; j += W) store(p + j, zero_times(load(s + j), factor));
      if (to && p == column_) store_row(to, call_.probs.dtype, call_.probs.col, n, p);
      if (columns_)
        for (int64_t j = 0; j < n; ++j) columns_[t * kTile + j] += p[j];
    }
  }

  // x * factor, but zeros stay where the factor is NaN.
  static vf zero_times(vf x, float factor) { return factor == factor ? x * factor : select(x == 0.f, vf{}, all(kNaN)); }

  void drop() {
    for (int64_t i = 0; i < rows_; ++i)
      for (int64_t t = first_; t < last_; ++t) {
        if (kinds_[t] == kNone) continue;
        float* const s = scores_at(i, t);
        const float* const z = dropout_row(call_.dropout, b_, h_, q0_ + i, t * kTile, kTile, room_);
        for (int64_t j = 0; j < padded(keys_of(t)); j += W) store(s + j, load(s + j) * load(z + j));
      }
  }

  void multiply() {
    bool first = true;
    for (int64_t t = first_; t < last_; ++t) {
      if (kinds_[t] == kNone) continue;
      const Factor weights{scores_at(0, t), plan_.s_row, 1};
      const float* const v = values_.tile(t);
      if (kinds_[t] == kMixed && values_.is_broken(t)) {
        if (first) clear_out();
        mask_.bytes(t * kTile, keys_of(t), allowed_);
        add_allowed(rows_, keys_of(t), width_, weights, v, values_.stride(), out_, width_, allowed_, kTile, 1);
      } else {
        add_product(rows_, keys_of(t), width_, weights, v, values_.stride(), out_, width_, first);
      }
      first = false;
    }
    if (first) clear_out();
  }

  void clear_out() { memset(out_, 0, static_cast<size_t>(rows_ * width_) * 4); }

  void write_out(int64_t i) {
    float* const row = out_ + i * width_;
    const vf factor = all(factor_[i]);
    // Rows without keys give zeros, whatever values there are.
    for (int64_t d = 0; d < width_; d += W) store(row + d, factor_[i] == 0.f ? vf{} : load(row + d) * factor);
    store_row(at(call_.out, b_, h_, q0_ + i, 0), call_.out.dtype, call_.out.col, sizes_.value_dim, row);
    if (call_.wide.data) store_row(at(call_.wide, b_, h_, q0_ + i, 0), kFloat, call_.wide.col, sizes_.value_dim, row);
  }

  const Plan& plan_;
  const Attention& call_;
  const Sizes& sizes_;
  OrderedSums& sums_;
  Arena arena_;
  Panels panels_;
  Rows values_;
  Scorer scorer_;
  BlockMask mask_;
  int64_t width_, q_row_, pair_ = -1, b_ = 0, h_ = 0, q0_ = 0, rows_ = 0, first_ = 0, last_ = 0;
  float *q_, *out_, *top_, *factor_, *scores_, *room_, *column_;
  float* columns_ = nullptr;
  Kind* kinds_;
  uint8_t* allowed_;
  bool failed_ = false;
};

}  // namespace

int FUSED_ATTN_ISA::attention_fwd(const Attention& call) {
  const Plan plan(call);
  OrderedSums sums;
  const Sizes& s = call.sizes;
  if (call.column_sums && !sums.begin(s.batch * s.heads, plan.parts, s.kv_len, 1)) return kNoMemory;
  return run_region<Worker>(plan, sums, s.batch * s.heads * plan.parts, kWorthThread);
}

}  // namespace fused_attn::cpu
