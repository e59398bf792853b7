// Score modifications on the device: the one list of this backend, and value and gradient of each. A new one is an entry in kMods, a kind,
// a case of `apply`, and one of `pull_back` unless it only adds something to the score.
#pragma once

#include "fused_attn/mask.cuh"

namespace fused_attn {

// In the order of kMods. name: that of the normal form (KernelScore.name); has_gradient: whether its tensor gets one, which
// attention_bwd_bias computes as the gradient of what is added to a score.
enum class ModKind : int { kSoftCap, kALiBi, kBias, kLevel };
struct ModEntry {
  const char* name;
  bool has_gradient;
};
constexpr ModEntry kMods[] = {{"softcap", false}, {"alibi", false}, {"bias", true}, {"level", false}};

// Where a score stands.
struct Place {
  int b, h, q, kv;
};

// tanh with float32's relative precision near 0 too: Cephes' polynomial below 0.625, the exponential form above.
__device__ inline float precise_tanh(float x) {
  const float square = x * x;
  float poly = fmaf(-5.70498872745e-3f, square, 2.06390887954e-2f);
  poly = fmaf(poly, square, -5.37397155531e-2f);
  poly = fmaf(poly, square, 1.33314422036e-1f);
  poly = fmaf(poly, square, -3.33332819422e-1f);
  const float magnitude = fabsf(x), large = 1.f - 2.f / (exp2f(magnitude * 2.88539008178f) + 1.f);
  return magnitude < 0.625f ? fmaf(x * square, poly, x) : copysignf(large, x);
}

__device__ inline float apply(const ScoreMod& mod, const Alignment& alignment, float s, Place p) {
  switch (mod.kind) {
    case ModKind::kSoftCap: return mod.scalar * precise_tanh(s / mod.scalar);
    case ModKind::kALiBi: {
      const int64_t distance = p.q - p.kv + query_shift(alignment, p.b);
      return s - load(mod.tensor, mod.dtype, p.b, p.h, 0, 0) * fabsf(static_cast<float>(distance));
    }
    case ModKind::kLevel: return 0.f;
    default: return s + load(mod.tensor, mod.dtype, p.b, p.h, p.q, p.kv);
  }
}

// The first `count` modifications, in order. A call of its own: inlined per element of a tile it makes the compiler four times slower.
__device__ __noinline__ inline float apply(const ScoreParams& score, float s, Place p, int count) {
  for (int i = 0; i < count; ++i) s = apply(score.mods[i], score.alignment, s, p);
  return s;
}

// A gradient after all modifications taken to before modification `down_to`; s is the scaled product.
__device__ __noinline__ inline float pull_back(const ScoreParams& score, float grad, float s, Place p, int down_to) {
  for (int i = score.count - 1; i >= down_to; --i) {
    if (score.mods[i].kind == ModKind::kSoftCap) {
      const float bent = precise_tanh(apply(score, s, p, i) / score.mods[i].scalar);
      grad *= 1.f - bent * bent;
    } else if (score.mods[i].kind == ModKind::kLevel && !isfinite(apply(score, s, p, i))) {
      grad = 0.f;
    }
  }
  return grad;
}

}  // namespace fused_attn
