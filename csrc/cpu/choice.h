// The choice of instruction set, and the functions by which Python makes it; library.cpp alone includes it.
#pragma once

#include <atomic>
#include <cstring>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define FUSED_ATTN_EXPORT extern "C" __attribute__((visibility("default")))

namespace fused_attn::cpu {

// Best first. The builder defines FUSED_ATTN_HAS_* for what it compiles the kernels for.
enum Isa : int { kAvx512, kAvx2, kPortable, kIsas };
constexpr const char* kNames[kIsas] = {"avx512", "avx2", "portable"};

inline std::atomic<int> chosen{kPortable};

// The instruction set whose kernels run.
inline Isa in_force() { return static_cast<Isa>(chosen.load(std::memory_order_relaxed)); }

#if defined(__x86_64__)
// The features of the flags in fused_attn/build_cpu.py, and that the operating system keeps the registers.
inline bool runs_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Older compilers do not know f16c by name.
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
  return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

inline bool runs_avx512() {
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#else
inline bool runs_avx2() { return false; }
inline bool runs_avx512() { return false; }
#endif

inline bool available(int isa) {
  switch (isa) {
#if defined(FUSED_ATTN_HAS_AVX512)
    case kAvx512: return runs_avx512();
#endif
#if defined(FUSED_ATTN_HAS_AVX2)
    case kAvx2: return runs_avx2();
#endif
    default: return isa == kPortable;
  }
}

}  // namespace fused_attn::cpu

// Names of the instruction sets that are both in the library and on this CPU, with commas between, best first.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_isas() {
  static const std::string text = [] {
    std::string names;
    for (int isa = 0; isa < fused_attn::cpu::kIsas; ++isa) {
      if (fused_attn::cpu::available(isa)) names += (names.empty() ? "" : ",") + std::string(fused_attn::cpu::kNames[isa]);
    }
    return names;
  }();
  return text.c_str();
}

// Chooses the kernels that later calls run; returns 1, or 0 where there are none of that name.
FUSED_ATTN_EXPORT int fused_attn_cpu_use(const char* name) {
  for (int isa = 0; isa < fused_attn::cpu::kIsas; ++isa) {
    if (std::strcmp(name, fused_attn::cpu::kNames[isa]) == 0 && fused_attn::cpu::available(isa)) {
      fused_attn::cpu::chosen.store(isa, std::memory_order_relaxed);
      return 1;
    }
  }
  return 0;
}

// The name of the instruction set whose kernels run.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_isa() { return fused_attn::cpu::kNames[fused_attn::cpu::in_force()]; }

// Which sources the library was built from: the builder's digest of this folder.
FUSED_ATTN_EXPORT const char* fused_attn_cpu_sources() { return FUSED_ATTN_SOURCES; }
