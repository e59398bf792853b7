// Which pairs of a tile may attend: intervals of keys per row, thinned by dense masks.
#pragma once

#include "cpu/params.h"
#include "cpu/simd.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kTile = 128;     // keys of a tile; tiles begin at its multiples
constexpr int64_t kMostRows = 96;  // query rows of a block

enum Kind : uint8_t { kNone, kMixed, kFull };

FUSED_ATTN_INLINE int64_t larger_of(int64_t a, int64_t b) { return a > b ? a : b; }
FUSED_ATTN_INLINE int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

struct Interval {
  int64_t start, end;
};

FUSED_ATTN_INLINE int64_t position_of(const Mask& m, int64_t b, int64_t q) { return q + (m.offsets ? m.offsets[b] : m.offset); }

FUSED_ATTN_INLINE int64_t limit_at(const Matrix& m, int64_t b, int64_t q) {
  return reinterpret_cast<const int32_t*>(m.data)[b * m.batch + q * m.row];
}

// Keys of one row, clipped to [0, kv_len]; nothing where start >= end.
FUSED_ATTN_INLINE Interval interval_of(const Mask& m, int64_t b, int64_t q, int64_t kv_len) {
  const int64_t position = position_of(m, b, q);
  Interval keys{0, kv_len};
  if (m.left >= 0) keys.start = larger_of(keys.start, position - m.left);
  if (m.right >= 0) keys.end = smaller_of(keys.end, position + m.right + 1);
  if (m.kv_start.data) keys.start = larger_of(keys.start, limit_at(m.kv_start, b, q));
  if (m.kv_end.data) keys.end = smaller_of(keys.end, limit_at(m.kv_end, b, q));
  return keys;
}

FUSED_ATTN_INLINE bool has_intervals(const Mask& m) { return m.left >= 0 || m.right >= 0 || m.kv_start.data || m.kv_end.data; }

FUSED_ATTN_INLINE uint64_t word_at(const char* p) {
  uint64_t w;
  memcpy(&w, p, 8);
  return w;
}

// 1 in every byte that is not 0: torch's bool may hold any byte, and reads all but 0 as true.
FUSED_ATTN_INLINE uint64_t ones_of(uint64_t word) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7fu;
  return ((((word & kLow) + kLow) | word) >> 7) & 0x0101010101010101u;
}

// The rows q0 .. q0 + rows of one (batch, head).
class BlockMask {
 public:
  void begin(const Mask& mask, int64_t b, int64_t h, int64_t q0, int64_t rows, int64_t kv_len) {
    mask_ = &mask;
    b_ = b, h_ = h, q0_ = q0, rows_ = rows, kv_len_ = kv_len;
    trivial_ = !has_intervals(mask) && mask.keep_count == 0;
    first_ = 0, last_ = kv_len, inner_first_ = 0, inner_last_ = kv_len;
    if (!has_intervals(mask)) {
      for (int64_t i = 0; i < rows; ++i) keys_[i] = {0, kv_len};
      return;
    }
    first_ = kv_len, last_ = 0;
    for (int64_t i = 0; i < rows; ++i) {
      const Interval keys = keys_[i] = interval_of(mask, b, q0 + i, kv_len);
      inner_first_ = larger_of(inner_first_, keys.start);
      inner_last_ = smaller_of(inner_last_, keys.end);
      if (keys.start >= keys.end) continue;
      first_ = smaller_of(first_, keys.start);
      last_ = larger_of(last_, keys.end);
    }
  }

  // The keys that any row reaches by its interval; first >= last where none does.
  int64_t first() const { return first_; }
  int64_t last() const { return last_; }

  // What the rows may attend to of keys j0 .. j0 + n. A tile that ends inside a vector is mixed: its last vector reads past the end.
  Kind kind(int64_t j0, int64_t n) const {
    if (trivial_) return n % W == 0 ? kFull : kMixed;
    if (last_ <= j0 || first_ >= j0 + n || first_ >= last_) return kNone;
    bool all = inner_first_ <= j0 && inner_last_ >= j0 + n;
    for (int64_t m = 0; m < mask_->keep_count; ++m) {
      const Kind found = kind_of(mask_->keeps[m], j0, n);
      if (found == kNone) return kNone;
      all &= found == kFull;
    }
    return all && n % W == 0 ? kFull : kMixed;
  }

  // Bytes of row i: 1 where keys j0 .. j0 + n may be attended, 0 elsewhere up to the end of the tile.
  void row(int64_t i, int64_t j0, int64_t n, uint8_t* to) const {
    const int64_t start = larger_of(keys_[i].start - j0, 0), end = smaller_of(keys_[i].end - j0, n);
    memset(to, 0, kTile);
    if (start >= end) return;
    memset(to + start, 1, static_cast<size_t>(end - start));
    for (int64_t m = 0; m < mask_->keep_count; ++m) thin(mask_->keeps[m], i, j0, n, to);
  }

  // Bytes of all rows, kTile apart.
  void bytes(int64_t j0, int64_t n, uint8_t* to) const {
    for (int64_t i = 0; i < rows_; ++i) row(i, j0, n, to + i * kTile);
  }

 private:
  const char* keep_at(const Matrix& keep, int64_t i, int64_t j) const {
    return keep.data + b_ * keep.batch + h_ * keep.head + (q0_ + i) * keep.row + j * keep.col;
  }

  void thin(const Matrix& keep, int64_t i, int64_t j0, int64_t n, uint8_t* to) const {
    const char* p = keep_at(keep, i, j0);
    if (keep.col == 0) {
      if (!*p) memset(to, 0, kTile);
      return;
    }
    int64_t j = 0;
    if (keep.col == 1)
      for (; j + 8 <= n; j += 8) {
        const uint64_t both = word_at(reinterpret_cast<char*>(to) + j) & ones_of(word_at(p + j));
        memcpy(to + j, &both, 8);
      }
    for (; j < n; ++j) to[j] &= p[j * keep.col] != 0;
  }

  // Stops at the first byte of the other kind.
  Kind kind_of(const Matrix& keep, int64_t j0, int64_t n) const {
    bool some = false, all = true;
    const int64_t rows = keep.row == 0 ? 1 : rows_, columns = keep.col == 0 ? 1 : n;
    for (int64_t i = 0; i < rows; ++i) {
      const char* p = keep_at(keep, i, j0);
      uint64_t any = 0, every = 0x0101010101010101u;
      int64_t j = 0;
      if (keep.col == 1)
        for (; j + 8 <= columns; j += 8) any |= word_at(p + j), every &= ones_of(word_at(p + j));
      for (; j < columns; ++j) any |= static_cast<uint64_t>(p[j * keep.col]), every &= p[j * keep.col] ? ~uint64_t{0} : 0;
      some |= any != 0;
      all &= every == 0x0101010101010101u;
      if (some && !all) return kMixed;
    }
    return all ? kFull : kNone;
  }

  const Mask* mask_;
  int64_t b_, h_, q0_, rows_, kv_len_;
  bool trivial_;
  int64_t first_, last_, inner_first_, inner_last_;
  Interval keys_[kMostRows];
};

}  // namespace
}  // namespace fused_attn::cpu
