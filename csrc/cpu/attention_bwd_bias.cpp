// The gradient of a bias that heads or batches share: every item is some rows of the bias, to which all who share it add in their order. A
// pass of its own, because items of attention_bwd belong to one head each; it makes scores and their gradients again, two of the five
// products.
#include "cpu/attention.h"
#include "cpu/gradient_tile.h"
#include "cpu/region.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kItemRows = 5 * kGradientRows;  // as many as make packing keys and values for every sharer cheap: 4 % at 2048 keys
constexpr int64_t kWorthThread = 512;             // as attention_bwd's, whose tiles these are

struct Plan {
  explicit Plan(const Attention& call) : call(call), mod(call.mods[call.place]) {
    const Sizes& s = call.sizes;
    batches = mod.grad.batch == 0 ? 1 : s.batch;
    heads = mod.grad.head == 0 ? 1 : s.heads;
    blocks = (s.q_len + kItemRows - 1) / kItemRows;
  }

  const Attention& call;
  const Mod& mod;
  int64_t batches, heads, blocks;  // of the bias
};

// Items share no sums.
struct Nothing {};

class Worker {
 public:
  Worker(const Plan& plan, const Nothing&, char* memory) : plan_(plan), call_(plan.call), arena_(memory) {
    tile_.reserve(arena_, call_, kItemRows);
  }

  size_t bytes() const { return static_cast<size_t>(arena_.used()); }
  bool failed() const { return false; }

  void run(Tasks& tasks, int64_t worker) {
    const Sizes& s = call_.sizes;
    for (int64_t task; (task = tasks.take(worker)) >= 0;) {
      const int64_t b = task / plan_.blocks / plan_.heads, h = task / plan_.blocks % plan_.heads;
      r0_ = task % plan_.blocks * kItemRows;
      r1_ = smaller_of(s.q_len, r0_ + kItemRows);
      const int64_t batches = plan_.mod.grad.batch == 0 ? s.batch : 1, heads = plan_.mod.grad.head == 0 ? s.heads : 1;
      for (int64_t n = 0; n < batches * heads; ++n) add(b + n / heads, h + n % heads, n == 0);
    }
  }

 private:
  void add(int64_t b, int64_t h, bool first) {
    const int64_t kv_head = h / (call_.sizes.heads / call_.sizes.kv_heads);
    tile_.begin_pair(b, kv_head);
    tile_.begin_rows(h, r0_, r1_ - r0_);
    for (int64_t q0 = r0_; q0 < r1_; q0 += kGradientRows) {
      const int64_t rows = smaller_of(kGradientRows, r1_ - q0);
      tile_.begin_block(q0, rows);
      for (int64_t t = 0; t < tiles_of(call_.sizes.kv_len); ++t) {
        const Kind kind = tile_.kind(t);
        if (kind != kNone) {
          tile_.make(t, kind);
          for (int64_t m = call_.mod_count - 1; m > call_.place; --m)
            if (has_slope(call_.mods[m].kind)) tile_.through(m, t);
        }
        if (kind != kNone || first) write(b, h, q0, rows, t, kind != kNone, first);
      }
    }
  }

  void write(int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t t, bool some, bool first) {
    const Matrix& grad = plan_.mod.grad;
    for (int64_t i = 0; i < rows; ++i) {
      float* const to = reinterpret_cast<float*>(at(grad, b, h, q0 + i, t * kTile));
      const float* const ds = tile_.ds + i * kTileRow;
      for (int64_t j = 0; j < tile_.keys_of(t); ++j) to[j] = (first ? 0.f : to[j]) + (some ? ds[j] : 0.f);
    }
  }

  const Plan& plan_;
  const Attention& call_;
  Arena arena_;
  GradientTile tile_;
  int64_t r0_ = 0, r1_ = 0;
};

}  // namespace

int FUSED_ATTN_ISA::attention_bwd_bias(const Attention& call) {
  const Plan plan(call);
  const Nothing nothing;
  return run_region<Worker>(plan, nothing, plan.batches * plan.heads * plan.blocks, kWorthThread);
}

}  // namespace fused_attn::cpu
