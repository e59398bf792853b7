// Scores of one tile: product, scale, modifications, mask.
#pragma once

#include "cpu/additive.h"
#include "cpu/dropout.h"

namespace fused_attn::cpu {
namespace {

// Rows that are scored together: 24 rows of a tile are 12 KB, and multiples of both micro-kernels' rows.
constexpr int64_t kGroup = 24;

// Derivatives of the modifications that have one besides 1, a tile each [rows x kTile] in the order of the modifications.
struct Slopes {
  float* tiles[kMaxMods];
  bool wanted;
};

FUSED_ATTN_INLINE bool has_slope(int64_t kind) { return kind == kSoftCap || kind == kLevel; }

struct StoreScaled {
  float* s;
  int64_t s_row;
  vf scale;
  float* top;           // [rows x W] running maxima, or nullptr
  const Matrix* ahead;  // what is read next at the same place, to be fetched while the product runs; or nullptr
  const char* ahead_at;

  FUSED_ATTN_INLINE void before(int64_t i, int64_t j, int rows) const {
    if (!ahead) return;
    // A bias streams from memory: fetched a panel ahead of its use, it costs 0.2 ns a score instead of 0.9.
    const int64_t width = width_of(ahead->dtype);
    for (int r = 0; r < rows; ++r) {
      const char* const p = ahead_at + ((i + r) * ahead->row + j) * width;
      for (int64_t byte = 0; byte < kPanel * width; byte += 64) __builtin_prefetch(p + byte, 0, 2);
    }
  }

  template <int M, int N>
  FUSED_ATTN_INLINE void operator()(int64_t i, int64_t j, vf (&acc)[M][N]) const {
#pragma GCC unroll 16
    for (int r = 0; r < M; ++r) {
      vf most = top ? load(top + (i + r) * W) : vf{};
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        const vf x = acc[r][n] * scale;
        if (top) most = larger(most, x);
        store(s + (i + r) * s_row + j + n * W, x);
      }
      if (top) store(top + (i + r) * W, most);
    }
  }
};

// Where a tile's scores go and what they are made of.
struct TileOf {
  int64_t q0, rows;  // query rows
  const float* q;    // their float32 copies, `q_row` apart
  int64_t q_row;
  const float* panels;  // the tile's keys
  int64_t j0, n;        // its first key and how many there are
};

class Scorer {
 public:
  void begin(const Attention& call, int64_t b, int64_t h) {
    call_ = &call;
    b_ = b, h_ = h;
    if (call.weight.data) weight_ = reinterpret_cast<const float*>(at(call.weight, b, h, 0, 0));
  }

  bool is_plain() const { return call_->mod_count == 0 && !call_->weight.data; }
  const float* weight() const { return weight_; }

  // Modified scores of every pair, s[i * s_row + j]; nothing masked yet. With `top` (is_plain only) the rows' maxima go along.
  void score(const TileOf& tile, float* s, int64_t s_row, float* top, const Slopes& slopes) const {
    const int64_t keys = padded(tile.n), depth = call_->sizes.head_dim;
    if (call_->weight.data) {
      additive_scores(tile.rows, depth, tile.q, tile.q_row, tile.panels, keys, weight_, s, s_row);
    } else {
      const Matrix* const ahead = streamed();
      const char* const from = ahead ? at(*ahead, b_, h_, tile.q0, tile.j0) : nullptr;
      StoreScaled emit{s, s_row, all(static_cast<float>(call_->scale)), top, ahead, from};
      multiply_panels(tile.rows, depth, tile.q, tile.q_row, tile.panels, keys, emit);
    }
    for (int64_t m = 0; m < call_->mod_count; ++m) modify(call_->mods[m], tile, s, s_row, slopes.wanted ? slopes.tiles[m] : nullptr);
  }

 private:
  const Matrix* streamed() const {
    for (int64_t m = 0; m < call_->mod_count; ++m) {
      const Matrix& t = call_->mods[m].tensor;
      if (call_->mods[m].kind == kBias && t.col == 1 && t.row != 0) return &t;
    }
    return nullptr;
  }

  void modify(const Mod& mod, const TileOf& tile, float* s, int64_t s_row, float* slope) const {
    for (int64_t i = 0; i < tile.rows; ++i, s += s_row) {
      float* const derivative = slope ? slope + i * kTile : nullptr;
      switch (mod.kind) {
        case kBias: add_bias(mod.tensor, tile, i, s); break;
        case kSoftCap: cap(static_cast<float>(mod.scalar), padded(tile.n), s, derivative); break;
        case kALiBi: add_distance(mod.tensor, tile, i, s); break;
        default: level(padded(tile.n), s, derivative);
      }
    }
  }

  void add_bias(const Matrix& bias, const TileOf& tile, int64_t i, float* s) const {
    if (bias.col == 0) {
      const vf x = all(load_one(at(bias, b_, h_, tile.q0 + i, 0), bias.dtype));
      for (int64_t j = 0; j < padded(tile.n); j += W) store(s + j, load(s + j) + x);
      return;
    }
    float room[kTile];
    const float* const row = row_of(bias, b_, h_, tile.q0 + i, tile.j0, tile.n, room);
    if (row == room)
      for (int64_t j = tile.n; j < padded(tile.n); ++j) room[j] = 0.f;
    for (int64_t j = 0; j < padded(tile.n); j += W) store(s + j, load(s + j) + load(row + j));
  }

  static void cap(float limit, int64_t keys, float* s, float* slope) {
    const vf inverse = all(1.f / limit);
    for (int64_t j = 0; j < keys; j += W) {
      const vf t = tanh_of(load(s + j) * inverse);
      store(s + j, t * limit);
      if (slope) store(slope + j, 1.f - t * t);
    }
  }

  void add_distance(const Matrix& slopes, const TileOf& tile, int64_t i, float* s) const {
    const float slope = load_one(at(slopes, b_, h_, tile.q0 + i, 0), slopes.dtype);
    const int64_t first = position_of(call_->mask, b_, tile.q0 + i) - tile.j0;
    for (int64_t j = 0; j < padded(tile.n); j += W) store(s + j, load(s + j) - distances(first - j) * slope);
  }

  static void level(int64_t keys, float* s, float* slope) {
    for (int64_t j = 0; j < keys; j += W) {
      const vf x = load(s + j);
      if (slope) store(slope + j, select((x - x) == 0.f, all(1.f), vf{}));
      store(s + j, vf{});
    }
  }

 public:
  // |position - key| for the W keys whose first is `gap` below the position.
  static vf distances(int64_t gap) {
    vi lane;
    for (int l = 0; l < W; ++l) lane[l] = l;
    if (gap >= int64_t{1} << 30 || gap <= -(int64_t{1} << 30)) return all(gap < 0 ? -static_cast<float>(gap) : static_cast<float>(gap));
    const vi d = static_cast<int32_t>(gap) - lane;
    return __builtin_convertvector(d < 0 ? -d : d, vf);
  }

 private:
  const Attention* call_;
  int64_t b_, h_;
  const float* weight_ = nullptr;
};

}  // namespace
}  // namespace fused_attn::cpu
