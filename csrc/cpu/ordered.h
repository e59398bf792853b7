// Sums of parts that different threads make, in the order of the parts whoever is done first.
#pragma once

#include <sched.h>

#include <cstdlib>

#include "cpu/simd.h"

namespace fused_attn::cpu {
namespace {

// A part: `rows` rows of `width` numbers, of which rows first .. last are there and the others count as zeros.
struct Part {
  int64_t first, last;
  float* data() { return reinterpret_cast<float*>(reinterpret_cast<char*>(this) + 64); }
};

class OrderedSums {
 public:
  // Room for the sums of `keys` keys, each of `parts` parts; false where there is no memory.
  bool begin(int64_t keys, int64_t parts, int64_t rows, int64_t width) {
    parts_ = parts, rows_ = rows, width_ = width;
    sums_ = static_cast<Sum*>(calloc(static_cast<size_t>(keys), sizeof(Sum)));
    waiting_ = static_cast<Part**>(calloc(static_cast<size_t>(keys * parts), sizeof(Part*)));
    keys_ = keys;
    return sums_ && waiting_;
  }

  ~OrderedSums() {
    for (int64_t k = 0; sums_ && k < keys_; ++k) free(sums_[k].total);
    for (int64_t p = 0; waiting_ && p < keys_ * parts_; ++p) free(waiting_[p]);
    free(sums_);
    free(waiting_);
  }

  static int64_t bytes(int64_t rows, int64_t width) { return (64 + rows * width * 4 + 63) / 64 * 64; }

  // A part of which rows first .. last are there, and zeros.
  static Part* clear(Part* part, int64_t first, int64_t last, int64_t width) {
    part->first = first, part->last = last;
    if (first < last) memset(part->data() + first * width, 0, static_cast<size_t>((last - first) * width) * 4);
    return part;
  }

  // The same in memory of its own; nullptr where there is none.
  Part* make(int64_t first, int64_t last) const {
    Part* part = static_cast<Part*>(aligned_alloc(64, static_cast<size_t>(bytes(rows_, width_))));
    return part ? clear(part, first, last, width_) : nullptr;
  }

  // Hands a part over. The whole sum, the caller's to free, where that was the last part missing; else nullptr.
  Part* add(int64_t key, int64_t number, Part* part) {
    Sum& sum = sums_[key];
    while (__atomic_exchange_n(&sum.busy, 1, __ATOMIC_ACQUIRE)) sched_yield();
    waiting_[key * parts_ + number] = part;
    while (sum.next < parts_ && waiting_[key * parts_ + sum.next]) {
      Part*& here = waiting_[key * parts_ + sum.next++];
      if (sum.total) {
        join(sum.total, here);
        free(here);
      } else {
        sum.total = here;
      }
      here = nullptr;
    }
    Part* whole = nullptr;
    if (sum.next == parts_) whole = sum.total, sum.total = nullptr;
    __atomic_store_n(&sum.busy, 0, __ATOMIC_RELEASE);
    return whole;
  }

 private:
  struct Sum {
    int busy;
    int64_t next;
    Part* total;
  };

  void clear(Part* part, int64_t first, int64_t last) const {
    if (first < last) memset(part->data() + first * width_, 0, static_cast<size_t>((last - first) * width_) * 4);
  }

  // total += part, where either has rows.
  void join(Part* total, Part* part) const {
    if (part->first >= part->last) return;
    if (total->first >= total->last) total->first = total->last = part->first;
    clear(total, part->first, total->first < part->last ? total->first : part->last);
    if (part->last < total->first) clear(total, part->last, total->first);
    clear(total, total->last > part->first ? total->last : part->first, part->last);
    if (total->last < part->first) clear(total, total->last, part->first);
    total->first = part->first < total->first ? part->first : total->first;
    total->last = part->last > total->last ? part->last : total->last;
    float* const to = total->data();
    const float* const from = part->data();
    for (int64_t i = part->first * width_; i < part->last * width_; ++i) to[i] += from[i];
  }

  int64_t keys_ = 0, parts_ = 0, rows_ = 0, width_ = 0;
  Sum* sums_ = nullptr;
  Part** waiting_ = nullptr;
};

}  // namespace
}  // namespace fused_attn::cpu
