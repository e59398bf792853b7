// What a launcher gets: plain structs that say the same as the Python package's normal form (fused_attn/lowering.py).
// No Torch and no CUDA headers, so every layer below the bindings can be compiled and read alone.
#pragma once

#include <cstdint>

namespace fused_attn {

// A [batch, heads, rows, cols] tensor: strides in elements, 0 along dimensions of size 1. data == nullptr: the tensor is not there.
struct Matrix {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, col = 0;
};

enum class DType : int { kHalf, kBFloat16, kFloat };

// Where query 0 sits on the key axis: the same place for every batch, or one per batch, which may lie beyond 32 bits.
struct Alignment {
  int shift = 0;
  const int64_t* shifts = nullptr;
};

// One contiguous interval of keys per query row, thinned by an optional dense mask.
struct MaskParams {
  int left = -1, right = -1;  // keys within [position - left, position + right]; -1: unlimited
  Alignment alignment;
  Matrix kv_start, kv_end;  // int32 [batch|1, 1, q_len, 1]: first and one-past-last key of a row
  Matrix keep;              // uint8 [batch|1, heads|1, q_len|1, kv_len|1], nonzero: may attend
  Matrix summary;           // int8 per tile of keep: 0 nothing may attend, 1 mixed, 2 everything may
};

enum class ModKind : int;  // listed in score_mod.cuh

// One score modification, applied after the scale; tensors are [batch|1, heads|1, q_len|1, kv_len|1].
struct ScoreMod {
  ModKind kind{};
  DType dtype = DType::kFloat;
  float scalar = 0.f;
  Matrix tensor;
};

constexpr int kMaxMods = 8;

struct ScoreParams {
  float scale = 1.f;
  bool raw = false;  // nothing but a positive scale: row maxima stay in the unit of the product, and scaling joins the exponent
  int count = 0;
  ScoreMod mods[kMaxMods];
  Alignment alignment;
};

// Word number (k + shift) % 4 of Philox4x32-7 at counter first + b * batch + h * head + q * row + (k + shift) / 4 decides about key k;
// words below the limit are removed. The numbers say where the call stands in the whole problem (KernelDropout of lowering.py).
struct DropoutParams {
  const int64_t* seed = nullptr;  // nullptr: no dropout
  uint32_t limit = 0;
  float factor = 1.f;  // 1 / (1 - p); 0 for p = 1
  int64_t first = 0, batch = 0, head = 0, row = 0;
  int shift = 0;
};

struct Sizes {
  int batch = 0, heads = 0, group = 1;  // group: query heads per key head
  int q_len = 0, kv_len = 0, head_dim = 0, value_dim = 0;
};

// One attention call; every pass reads the parts it needs. Rows are numbered r = (batch * heads + head) * q_len + query.
struct AttentionParams {
  Sizes sizes;
  MaskParams mask;
  ScoreParams score;
  DropoutParams dropout;
  Matrix q, k, v, out;
  Matrix wide;   // float32 copy of out, kept where 16 bits would cost the sinks' gradient its accuracy
  Matrix sinks;  // [1, heads, 1, 1]
  DType sinks_dtype = DType::kFloat;
  float* lse = nullptr;    // [rows]
  float* top = nullptr;    // [rows] largest score, sinks included
  float* sum = nullptr;    // [rows] sum of exp(score - top), sinks included; 0 in rows without keys or with scores of -inf alone
  float* delta = nullptr;  // [rows]
  Matrix dout, dprobs, dscores, dq, dk, dv;
  DType scores_dtype = DType::kFloat, dscores_dtype = DType::kFloat;
  Matrix dlse;                   // float [batch, heads, q_len, 1]
  Matrix probs, scores;          // outputs of the auxiliary pass, or (probs) an input of delta
  float* max_scores = nullptr;   // [rows]
  float* entropy = nullptr;      // [rows]
  float* column_sums = nullptr;  // [batch, heads, kv_len]
  // Bias gradient before modification number `place`: out[b, h, q, k] += ..., summed over what it broadcasts along.
  int place = 0;
  Matrix dbias;
  DType dbias_dtype = DType::kFloat;
  int over_batch = 1, over_heads = 1;  // how many batches and heads share an element of dbias
  bool over_q = false, over_kv = false;
};

// One masked softmax over the last dimension of [batch, heads, q_len, kv_len].
struct SoftmaxParams {
  Sizes sizes;
  MaskParams mask;
  ScoreParams score;  // at most one modification, a bias
  DropoutParams dropout;
  Matrix x, out;
  Matrix probs;  // before dropout, contiguous; there only with dropout
  bool log = false, uniform_empty = false;
  Matrix result, dout, dx;  // backward: probabilities before dropout or their logarithms, what arrives, what goes out
  float* totals = nullptr;  // backward: [2, rows], sum of p * g of each row (of g for logarithms), and 1 for rows with scores above -inf
  // Gradient of a bias [bias.batch, bias.heads, bias.q_len, kv_len], each 1 or full: partial sums over the rows that share an element.
  float* dbias = nullptr;  // [bias_splits, bias.batch, bias.heads, bias.q_len, kv_len]
  Sizes bias;
  int bias_splits = 1;
};

}  // namespace fused_attn
