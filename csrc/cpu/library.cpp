#include "params.h"
#define FUSED_ATTN_DECLARE(isa)             \
  namespace fused_attn::cpu::isa {          \
  int attention_fwd(const Attention& call); \
  int attention_bwd(const Attention& call); \
  }
FUSED_ATTN_DECLARE(avx512)
FUSED_ATTN_DECLARE(avx2)
FUSED_ATTN_DECLARE(portable)
using namespace fused_attn::cpu;
static int current = 0;
extern "C" __attribute__((visibility("default"))) void fused_attn_cpu_use(int which) { current = which; }
extern "C" __attribute__((visibility("default"))) int fused_attn_cpu_attention_fwd(const Attention* call) {
  return (current == 0 ? avx512::attention_fwd : current == 1 ? avx2::attention_fwd : portable::attention_fwd)(*call);
}
extern "C" __attribute__((visibility("default"))) int fused_attn_cpu_attention_bwd(const Attention* call) {
  return (current == 0 ? avx512::attention_bwd : current == 1 ? avx2::attention_bwd : portable::attention_bwd)(*call);
}
