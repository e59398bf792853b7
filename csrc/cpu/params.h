// What Python hands over: fused_attn/backends/cpu/arguments.py packs these structs field by field, 64 bits each, in this order. They say
// the same as the package's normal form (fused_attn/lowering.py).
#pragma once

#include <cstdint>

namespace fused_attn::cpu {

enum DType : int64_t { kFloat, kHalf, kBFloat16, kDouble };

// A [batch, heads, rows, cols] tensor: strides in elements, 0 along dimensions of size 1. data == nullptr: the tensor is not there.
struct Matrix {
  char* data;
  int64_t batch, head, row, col;
  int64_t dtype;  // DType; masks hold bytes and intervals int32, whatever stands here
};

struct Sizes {
  int64_t batch, heads, kv_heads, q_len, kv_len, head_dim, value_dim;
};

constexpr int kMaxKeeps = 4;
constexpr int kMaxMods = 8;

// One contiguous interval of keys per query row, thinned by dense masks that all have to say yes.
struct Mask {
  int64_t left, right;      // keys within [position - left, position + right]; -1: unlimited
  int64_t offset;           // position of query 0 on the key axis
  const int64_t* offsets;   // or one per batch
  Matrix kv_start, kv_end;  // int32 [batch|1, 1, q_len, 1]: first and one-past-last key of a row
  int64_t keep_count;
  Matrix keeps[kMaxKeeps];  // bytes, 1: may attend
};

// Word (k + shift) % 4 of Philox4x32-7 at counter first + b * batch + h * head + q * row + (k + shift) / 4 decides about key k; words below
// the limit are removed (KernelDropout.counters).
struct Dropout {
  const int64_t* seed;  // nullptr: no dropout
  int64_t limit;        // up to 2^32
  double factor;        // 1 / (1 - p); 0 for p = 1
  int64_t first, batch, head, row, shift;
};

enum ModKind : int64_t { kBias, kSoftCap, kALiBi, kLevel };

// One score modification, applied after the scale in the order given; tensors are [batch|1, heads|1, q_len|1, kv_len|1].
struct Mod {
  int64_t kind;
  double scalar;
  Matrix tensor;
  // Gradients of the tensor, float32 and contiguous but for `grad`; at most one is there.
  Matrix grad;      // of every pair: any strides, its own dtype; or, where heads or batches share it, summed by attention_bwd_bias
  float* row_grad;  // [batch, heads, q_len]: summed over keys (ALiBi: of the slopes)
  float* col_grad;  // [batch, heads, kv_len]: summed over queries
};

struct Attention {
  Sizes sizes;
  int64_t threads;
  Mask mask;
  double scale;
  int64_t mod_count;
  Mod mods[kMaxMods];
  Matrix weight;       // of additive scoring, float32 [1, heads|1, 1, head_dim]
  float* weight_grad;  // [batch, heads, head_dim]
  int64_t is_sigmoid;  // the normaliser, with its bias
  double sigmoid_bias;
  Matrix sinks;  // [1, heads, 1, 1]
  Dropout dropout;
  Matrix q, k, v, out;
  Matrix wide;  // float32 copy of out, kept where 16 bits would cost the sinks' gradient its accuracy; the backward's out, then
  float *lse, *top,
      *sum;  // [batch, heads, q_len]: log of the sum, largest score, sum of exp(score - top), sinks included; the forward's may be missing
  // Given out besides by the forward.
  Matrix probs, scores;
  float *max_scores, *entropy;  // [batch, heads, q_len]
  float* column_sums;           // [batch, heads, kv_len]
  // Arriving at the backward; saved: probabilities as they were given out.
  Matrix dout, dlse, dprobs, dscores, saved;
  Matrix dq, dk, dv;
  float* delta;   // [batch, heads, q_len]: what softmax takes off every element's gradient
  int64_t place;  // attention_bwd_bias: the modification whose shared gradient is made
};

// One masked softmax over the last dimension of [batch, heads, q_len, kv_len] (sizes.kv_heads, head_dim and value_dim mean nothing).
struct Softmax {
  Sizes sizes;
  int64_t threads;
  Mask mask;
  double scale;
  Matrix bias;
  Dropout dropout;
  int64_t is_log, is_uniform;  // logarithms instead; 1 / kv_len in rows without keys
  Matrix x, out, probs;        // probs: before dropout, there only with dropout
  Matrix result, dout, dx;     // backward: probabilities before dropout, or their logarithms; what arrives; what goes out
  Matrix dbias;                // backward: any strides and its own dtype where it has an element per score, else float32
};

// What a pass returns.
enum Status : int { kDone = 0, kNoMemory = 1 };

}  // namespace fused_attn::cpu
