// 2^x by the special function unit, denormal results flushed to zero.
#pragma once

namespace fused_attn::ptx {

__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fused_attn::ptx
