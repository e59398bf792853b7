// One pass as a parallel region: a worker per thread on that thread's own memory, tasks until there are none left.
#pragma once

#include "cpu/params.h"
#include "cpu/threads.h"

namespace fused_attn::cpu {
namespace {

// Worker(plan, shared, memory) asks for bytes() with memory == nullptr; run(tasks, worker) takes tasks; failed() says that there was no
// memory.
template <class Worker, class Plan, class Shared>
class Region {
 public:
  Region(const Plan& plan, Shared& shared, int64_t count, int64_t threads)
      : plan_(plan), shared_(shared), tasks_(count, threads), bytes_(Worker(plan, shared, nullptr).bytes()) {}

  int run(int64_t threads) {
    parallel(threads, enter, this);
    return status_;
  }

 private:
  static void enter(void* context, int64_t worker) {
    Region& region = *static_cast<Region*>(context);
    char* const memory = static_cast<char*>(scratch(region.bytes_));
    if (!memory) return region.fail();
    Worker work(region.plan_, region.shared_, memory);
    work.run(region.tasks_, worker);
    if (work.failed()) region.fail();
  }

  void fail() { __atomic_store_n(&status_, kNoMemory, __ATOMIC_RELAXED); }

  const Plan& plan_;
  Shared& shared_;
  Tasks tasks_;
  size_t bytes_;
  int status_ = kDone;
};

// Runs `count` tasks on at most as many threads, and on one more for every `worth` scores.
template <class Worker, class Plan, class Shared>
int run_region(const Plan& plan, Shared& shared, int64_t count, int64_t worth) {
  const Sizes& s = plan.call.sizes;
  int64_t threads = s.batch * s.heads * s.q_len * s.kv_len / worth + 1;
  if (threads > count) threads = count;
  if (threads > plan.call.threads) threads = plan.call.threads;
  return Region<Worker, Plan, Shared>(plan, shared, count, threads).run(threads);
}

}  // namespace
}  // namespace fused_attn::cpu
