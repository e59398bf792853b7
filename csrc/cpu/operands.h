// Keys and values of one head as the products want them, made tile by tile when they are first needed.
#pragma once

#include "cpu/convert.h"
#include "cpu/mask.h"
#include "cpu/product.h"

namespace fused_attn::cpu {
namespace {

// A thread's memory, cut into pieces that begin at whole cache lines.
class Arena {
 public:
  explicit Arena(char* data) : data_(data) {}
  template <class T>
  T* take(int64_t count) {
    char* const from = data_ ? data_ + used_ : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(from);
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

FUSED_ATTN_INLINE int64_t tiles_of(int64_t length) { return (length + kTile - 1) / kTile; }

// One head of [.., length, width] rows.
struct Head {
  const Matrix* matrix;
  int64_t b, h, length, width;

  int64_t rows(int64_t tile) const { return smaller_of(kTile, length - tile * kTile); }
};

// Rows packed for `multiply_panels`: panel p of a tile holds element d of rows p * kPanel ... side by side, [panels][width][kPanel]; zeros
// after the last row.
class Panels {
 public:
  void reserve(Arena& arena, int64_t length, int64_t width) {
    data_ = arena.take<float>(tiles_of(length) * kTile * width);
    ready_ = arena.take<uint8_t>(tiles_of(length));
    rows_ = arena.take<float>(W * padded(width));
  }

  void begin(const Head& head) {
    head_ = head;
    memset(ready_, 0, static_cast<size_t>(tiles_of(head.length)));
  }

  const float* tile(int64_t t) {
    float* const to = data_ + t * kTile * head_.width;
    if (!ready_[t]) pack(t, to);
    ready_[t] = 1;
    return to;
  }

 private:
  // W rows at a time, in squares that are turned in registers: 0.4 ns a number where one store for each took 1.3.
  void pack(int64_t t, float* to) const {
    const int64_t rows = head_.rows(t), width = head_.width, stride = padded(width);
    const Matrix& m = *head_.matrix;
    const bool direct = m.dtype == kFloat && m.col == 1 && stride == width;
    for (int64_t j = 0; j < rows || j % kPanel != 0; j += W) {
      const float* from[W];
      for (int64_t i = 0; i < W; ++i) {
        from[i] = rows_ + i * stride;
        if (j + i < rows && direct) from[i] = reinterpret_cast<const float*>(at(m, head_.b, head_.h, t * kTile + j + i, 0));
        else copy(t * kTile + j + i, j + i < rows ? width : 0, rows_ + i * stride);
      }
      float* const panel = to + j / kPanel * kPanel * width + j % kPanel;
      for (int64_t d = 0; d < width; d += W) {
        vf square[W];
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) square[i] = load(from[i] + d);
        transpose(square);
        if (d + W <= width) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(panel + (d + i) * kPanel, square[i]);
        } else {
          for (int64_t i = 0; i < width - d; ++i) store(panel + (d + i) * kPanel, square[i]);
        }
      }
    }
  }

  // `width` numbers of a row, then zeros.
  void copy(int64_t row, int64_t width, float* to) const {
    if (width) load_row(at(*head_.matrix, head_.b, head_.h, row, 0), head_.matrix->dtype, head_.matrix->col, width, to);
    for (int64_t d = width; d < padded(head_.width); ++d) to[d] = 0.f;
  }

  Head head_;
  float *data_, *rows_;
  uint8_t* ready_;
};

// Rows as float32 with zeros up to a whole vector: where they lie if they can be read there, else a copy.
class Rows {
 public:
  void reserve(Arena& arena, const Matrix& matrix, int64_t length, int64_t width) {
    is_direct_ = matrix.dtype == kFloat && matrix.col == 1 && width % W == 0;
    stride_ = is_direct_ ? matrix.row : padded(width);
    data_ = is_direct_ ? nullptr : arena.take<float>(length * padded(width));
    state_ = arena.take<uint8_t>(tiles_of(length));
  }

  void begin(const Head& head) {
    head_ = head;
    memset(state_, 0, static_cast<size_t>(tiles_of(head.length)));
  }

  int64_t stride() const { return stride_; }

  const float* tile(int64_t t) {
    if (is_direct_) return reinterpret_cast<const float*>(at(*head_.matrix, head_.b, head_.h, t * kTile, 0));
    float* const to = data_ + t * kTile * stride_;
    if (!(state_[t] & kCopied)) copy(t, to);
    state_[t] |= kCopied;
    return to;
  }

  // Whether any number of the tile is NaN or infinite.
  bool is_broken(int64_t t) {
    if (!(state_[t] & kChecked)) {
      const float* const from = tile(t);
      bool finite = true;
      for (int64_t j = 0; j < head_.rows(t); ++j) finite &= are_finite(from + j * stride_, head_.width);
      state_[t] |= kChecked | (finite ? 0 : kBroken);
    }
    return state_[t] & kBroken;
  }

 private:
  enum : uint8_t { kCopied = 1, kChecked = 2, kBroken = 4 };

  void copy(int64_t t, float* to) const {
    for (int64_t j = 0; j < head_.rows(t); ++j, to += stride_) {
      load_row(at(*head_.matrix, head_.b, head_.h, t * kTile + j, 0), head_.matrix->dtype, head_.matrix->col, head_.width, to);
      for (int64_t d = head_.width; d < stride_; ++d) to[d] = 0.f;
    }
  }

  Head head_;
  bool is_direct_;
  int64_t stride_;
  float* data_;
  uint8_t* state_;
};

// `count` query rows from q0 on as float32, `padded(width)` apart, with zeros after each.
inline void copy_rows(const Matrix& m, int64_t b, int64_t h, int64_t q0, int64_t count, int64_t width, float* to) {
  const int64_t stride = padded(width);
  for (int64_t i = 0; i < count; ++i, to += stride) {
    load_row(at(m, b, h, q0 + i, 0), m.dtype, m.col, width, to);
    for (int64_t d = width; d < stride; ++d) to[d] = 0.f;
  }
}

// Rows times a tile of panels: emit(i, j, sums) gets the sums of rows i ... and keys j ... of the tile, as vectors in registers.
template <int M, class Emit>
FUSED_ATTN_INLINE void multiply_panel(int64_t i, int64_t j, int64_t depth, const float* a, int64_t a_row, const float* panel, Emit& emit) {
  vf acc[M][kPanelVectors];
  clear(acc);
  emit.before(i, j, M);
  accumulate<M, kPanelVectors>(depth, a + i * a_row, a_row, 1, panel, kPanel, acc);
  emit(i, j, acc);
}

template <class Emit>
inline void multiply_panels(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* panels, int64_t keys, Emit& emit) {
  for (int64_t j = 0; j < keys; j += kPanel, panels += depth * kPanel) {
    int64_t i = 0;
    for (; i + kPanelRows <= rows; i += kPanelRows) multiply_panel<kPanelRows>(i, j, depth, a, a_row, panels, emit);
    for (; i + 2 <= rows; i += 2) multiply_panel<2>(i, j, depth, a, a_row, panels, emit);
    if (i < rows) multiply_panel<1>(i, j, depth, a, a_row, panels, emit);
  }
}

}  // namespace
}  // namespace fused_attn::cpu
