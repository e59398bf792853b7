// Threads and their memory, for all instruction sets alike.
#include "cpu/threads.h"

#include <cstdlib>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#include <system_error>
#include <thread>
#include <vector>

namespace fused_attn::cpu {
namespace {

// Bytes that a thread keeps from one call to the next: packed keys and values of 8192 rows of 128 numbers, and a block of scores.
constexpr size_t kKept = size_t{24} << 20;

struct Scratch {
  void* data = nullptr;
  size_t bytes = 0;
  void release() {
    free(data);
    data = nullptr;
    bytes = 0;
  }
  ~Scratch() { release(); }
};

thread_local Scratch own;

using Region = void (*)(void (*)(void*), void*, unsigned, unsigned);

// What g++ calls for a parallel region of OpenMP; libgomp has it, and LLVM's libomp for g++'s sake. torch has loaded one of them for
// everyone to see: with a pool of our own beside it, the threads of the one would spin while those of the other have work.
Region find_region() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<Region>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

struct Call {
  void (*work)(void*, int64_t);
  void* context;
  int64_t workers;
};

void enter(void* data) {
  Call& call = *static_cast<Call*>(data);
  call.work(call.context, __atomic_fetch_add(&call.workers, 1, __ATOMIC_RELAXED));
  trim_scratch();
}

}  // namespace

void parallel(int64_t threads, void (*work)(void*, int64_t), void* context) {
  Call call{work, context, 0};
  if (threads <= 1) return enter(&call);
  static const Region region = find_region();
  if (region) return region(enter, &call, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(enter, &call);
  } catch (const std::system_error&) {  // as many as the machine gives
  }
  enter(&call);
  for (std::thread& other : others) other.join();
}

void* scratch(size_t bytes) {
  if (bytes > own.bytes) {
    own.release();
    const size_t rounded = (bytes + 63) / 64 * 64;
    own.data = aligned_alloc(64, rounded);
    own.bytes = own.data ? rounded : 0;
  }
  return own.data;
}

void trim_scratch() {
  if (own.bytes > kKept) own.release();
}

}  // namespace fused_attn::cpu
