// The face of the CPU library: plain C functions for ctypes, and the choice of instruction set. Compiled once, for every CPU of its
// architecture; each other .cpp here is compiled once per instruction set, into fused_attn::cpu::avx512, ::avx2 and ::portable.

#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FUSED_ATTN_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Best first. The builder defines FUSED_ATTN_HAS_* for what it compiles the kernels for.
constexpr const char* kNames[] = {"avx512", "avx2", "portable"};
constexpr int kCount = 3;
constexpr int kPortable = 2;

std::atomic<int> in_force{kPortable};

#if defined(__x86_64__)
// The features of the flags in fused_attn/build_cpu.py, and that the operating system keeps the registers.
bool runs_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Older compilers do not know f16c by name.
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
bool runs_avx2() { return false; }
bool runs_avx512() { return false; }
#endif

bool available(int isa) {
  switch (isa) {
#if defined(FUSED_ATTN_HAS_AVX512)
    case 0: return runs_avx512();
#endif
#if defined(FUSED_ATTN_HAS_AVX2)
    case 1: return runs_avx2();
#endif
    default: return isa == kPortable;
  }
}

}  // namespace

// Names of the instruction sets that are both in the library and on this CPU, with commas between, best first.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_isas() {
  static const std::string text = [] {
    std::string names;
    for (int isa = 0; isa < kCount; ++isa) {
      if (available(isa)) names += (names.empty() ? "" : ",") + std::string(kNames[isa]);
    }
    return names;
  }();
  return text.c_str();
}

// Chooses the kernels that later calls run; returns 1, or 0 where there are none of that name.
FUSED_ATTN_EXPORT int fused_attn_cpu_use(const char* name) {
  for (int isa = 0; isa < kCount; ++isa) {
    if (std::strcmp(name, kNames[isa]) == 0 && available(isa)) {
      in_force.store(isa, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}

// The name of the instruction set whose kernels run.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_isa() { return kNames[in_force.load(std::memory_order_relaxed)]; }

// Which sources the library was built from: the builder's digest of this folder.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_sources() { return FUSED_ATTN_SOURCES; }
