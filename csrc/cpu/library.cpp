// The face of the CPU library: plain C functions for ctypes, one per pass, that return a Status. Compiled once, for every CPU of its
// architecture; each kernel unit is compiled once per instruction set, into fused_attn::cpu::avx512, ::avx2 and ::portable.

#include "cpu/choice.h"
#include "cpu/params.h"

#define FUSED_ATTN_PASSES             \
  PASS(attention_fwd, Attention)      \
  PASS(attention_bwd, Attention)      \
  PASS(attention_bwd_bias, Attention) \
  PASS(softmax_fwd, Softmax)          \
  PASS(softmax_bwd, Softmax)

#define PASS(name, Call) int name(const Call& call);
namespace fused_attn::cpu {
namespace avx512 {
FUSED_ATTN_PASSES
}
namespace avx2 {
FUSED_ATTN_PASSES
}
namespace portable {
FUSED_ATTN_PASSES
}
}  // namespace fused_attn::cpu
#undef PASS

// An instruction set that was left out is never in force.
#if defined(FUSED_ATTN_HAS_AVX512)
#define FUSED_ATTN_AVX512 avx512
#else
#define FUSED_ATTN_AVX512 portable
#endif
#if defined(FUSED_ATTN_HAS_AVX2)
#define FUSED_ATTN_AVX2 avx2
#else
#define FUSED_ATTN_AVX2 portable
#endif

#define PASS(name, Call)                                                                     \
  FUSED_ATTN_EXPORT int fused_attn_cpu_##name(const fused_attn::cpu::Call* call) {           \
    switch (fused_attn::cpu::in_force()) {                                                   \
      case fused_attn::cpu::kAvx512: return fused_attn::cpu::FUSED_ATTN_AVX512::name(*call); \
      case fused_attn::cpu::kAvx2: return fused_attn::cpu::FUSED_ATTN_AVX2::name(*call);     \
      default: return fused_attn::cpu::portable::name(*call);                                \
    }                                                                                        \
  }
FUSED_ATTN_PASSES
