// One parallel region per pass, on the threads that torch's own operations use where they can be found.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_attn::cpu {

// Calls work(context, worker) for worker = 0 .. threads - 1, at the same time as far as there are cores; back when all are done.
void parallel(int64_t threads, void (*work)(void* context, int64_t worker), void* context);

// At least `bytes` of this thread's own memory, aligned to 64, the same on every call that asks for no more; nullptr where there is none
// left.
void* scratch(size_t bytes);
// Gives back what is more than a thread should keep between calls.
void trim_scratch();

namespace {

// Tasks 0 .. count - 1, each taken once: every worker goes through its own contiguous share, then helps with the others', so that
// neighbours (which share packed keys) stay on one thread while a thread that the machine holds up cannot hold up the rest.
class Tasks {
 public:
  Tasks(int64_t count, int64_t workers) : count_(count), workers_(workers < kMost ? workers : kMost) {
    for (int64_t w = 0; w < workers_; ++w) next_[w].value = begin(w);
  }

  // The next task for a worker, or -1.
  int64_t take(int64_t worker) {
    for (int64_t i = 0; i < workers_; ++i) {
      const int64_t w = (worker + i) % workers_, end = begin(w + 1);
      if (__atomic_load_n(&next_[w].value, __ATOMIC_RELAXED) >= end) continue;
      const int64_t task = __atomic_fetch_add(&next_[w].value, 1, __ATOMIC_RELAXED);
      if (task < end) return task;
    }
    return -1;
  }

 private:
  static constexpr int64_t kMost = 256;
  struct alignas(64) Counter {
    int64_t value;
  };
  int64_t begin(int64_t w) const { return count_ * w / workers_; }

  int64_t count_, workers_;
  Counter next_[kMost];
};

}  // namespace
}  // namespace fused_attn::cpu
