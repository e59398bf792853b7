// The operators of the native backend, namespace fused_attn_cuda, on LibTorch's stable ABI: the only file with Torch headers.
//
// Their arguments are the normal form flattened (Terms.SCHEMA of fused_attn/lowering.py). Arguments are checked by the Python package
// before they come here. What has its layout from an input (out, gradients) is allocated by the caller and written here, any strides;
// a tensor of a fixed layout is returned, without elements where it is not wanted.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "fused_attn/launch.h"
#include "fused_attn/stream.h"

namespace fused_attn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

#define FUSED_ATTN_TERMS                                                                                                                \
  Optional q_offset, Optional kv_start, Optional kv_end, Optional keep, Optional seed, Optional sinks, std::vector<Tensor> mod_tensors, \
      std::vector<int64_t> ints, std::vector<double> floats, std::string mods
#define FUSED_ATTN_TERM_VALUES {q_offset, kv_start, kv_end, keep, seed, sinks, mod_tensors, ints, floats, mods}

// The flattened normal form.
struct Terms {
  const Optional &q_offset, &kv_start, &kv_end, &keep, &seed, &sinks;
  const std::vector<Tensor>& mod_tensors;
  const std::vector<int64_t>& ints;   // left, right (-1: unlimited), q_offset where it is a number; with a seed, its origin and extent
  const std::vector<double>& floats;  // scale, chance of removal, the modifications' scalars
  const std::string& mods;            // name:scalars:tensors, separated by commas
};

constexpr int64_t kFar = int64_t{1} << 30;  // windows and offsets beyond reach every key; clamping keeps index arithmetic in 32 bits

int clamped(int64_t x) { return static_cast<int>(x > kFar ? kFar : x < -kFar ? -kFar : x); }

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half: return DType::kHalf;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Float: return DType::kFloat;
    default: STD_TORCH_CHECK(false, "the cuda backend takes float16, bfloat16 and float32 tensors");
  }
}

Matrix matrix(const Tensor& t, int64_t dims = 4) {
  STD_TORCH_CHECK(t.dim() == dims, "the cuda backend expected a tensor of ", dims, " dimensions; got ", t.dim());
  const auto stride = [&](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  switch (dims) {
    case 2: return {t.data_ptr(), stride(0), 0, stride(1), 0};          // [batch, rows]
    case 3: return {t.data_ptr(), stride(0), stride(1), stride(2), 0};  // [batch, heads, rows]
    default: return {t.data_ptr(), stride(0), stride(1), stride(2), stride(3)};
  }
}

Matrix matrix(const Optional& t, int64_t dims = 4) { return t.has_value() ? matrix(*t, dims) : Matrix{}; }

// Tensors in host memory (the simulator's) have no stream.
cudaStream_t stream_of(const Tensor& t) { return t.is_cuda() ? static_cast<cudaStream_t>(current_stream(t.get_device_index())) : nullptr; }

void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "the cuda backend could not launch ", what, ": ", cudaGetErrorString(error));
}

// Makes a tensor's device current for the launches of a call; tensors in host memory (the simulator's) have none.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard_.emplace(t.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

Tensor empty(const Tensor& like, std::vector<int64_t> sizes, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

float* floats_of(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

Alignment alignment(const Terms& terms) {
  if (terms.q_offset.has_value()) return {0, static_cast<const int64_t*>(terms.q_offset->data_ptr())};
  return {clamped(terms.ints[2])};
}

MaskParams mask_params(const Terms& terms) {
  MaskParams mask;
  // A window that wide reaches every key from an offset that is a number, but not from one that may lie anywhere.
  const int64_t far = terms.q_offset.has_value() ? INT32_MAX : kFar;
  mask.left = terms.ints[0] >= far ? -1 : static_cast<int>(terms.ints[0]);
  mask.right = terms.ints[1] >= far ? -1 : static_cast<int>(terms.ints[1]);
  mask.alignment = alignment(terms);
  mask.kv_start = matrix(terms.kv_start, 2), mask.kv_end = matrix(terms.kv_end, 2), mask.keep = matrix(terms.keep);
  return mask;
}

ScoreParams score_params(const Terms& terms) {
  ScoreParams score;
  score.scale = static_cast<float>(terms.floats[0]);
  score.alignment = alignment(terms);
  size_t scalar = 2, tensor = 0;
  for (size_t from = 0; from < terms.mods.size();) {
    size_t to = terms.mods.find(',', from);
    if (to == std::string::npos) to = terms.mods.size();
    const std::string entry = terms.mods.substr(from, to - from);
    const size_t first = entry.find(':'), second = entry.find(':', first + 1);
    const int kind = mod_kind(entry.substr(0, first)), scalars = std::stoi(entry.substr(first + 1)),
              tensors = std::stoi(entry.substr(second + 1));
    STD_TORCH_CHECK(kind >= 0 && scalars <= 1 && tensors <= 1, "the cuda backend has no score modification ", entry);
    STD_TORCH_CHECK(score.count < kMaxMods, "the cuda backend takes at most ", kMaxMods, " score modifications");
    ScoreMod& mod = score.mods[score.count++];
    mod.kind = static_cast<ModKind>(kind);
    if (scalars == 1) mod.scalar = static_cast<float>(terms.floats[scalar++]);
    if (tensors == 1) mod.tensor = matrix(terms.mod_tensors[tensor]), mod.dtype = dtype_of(terms.mod_tensors[tensor]), ++tensor;
    from = to + 1;
  }
  score.raw = score.count == 0 && !terms.sinks.has_value() && score.scale > 0.f;
  return score;
}

DropoutParams dropout_params(const Terms& terms, const Sizes& sizes) {
  DropoutParams dropout;
  if (!terms.seed.has_value()) return dropout;
  const double p = terms.floats[1], limit = std::nearbyint(p * 4294967296.0);
  dropout.seed = static_cast<const int64_t*>(terms.seed->data_ptr());
  // The largest word is 2^32 - 1; with p = 1 the factor 0 removes what the comparison leaves.
  dropout.limit = limit > 4294967295.0 ? 4294967295u : static_cast<uint32_t>(limit);
  dropout.factor = p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.f;
  const int64_t *origin = terms.ints.data() + 3, *extent = origin + 4;  // -1: the call is the whole problem
  const int64_t heads = extent[1] < 0 ? sizes.heads : extent[1], q_len = extent[2] < 0 ? sizes.q_len : extent[2];
  dropout.row = ((extent[3] < 0 ? sizes.kv_len : extent[3]) + 3) / 4;
  dropout.head = q_len * dropout.row, dropout.batch = heads * dropout.head;
  dropout.first = origin[0] * dropout.batch + origin[1] * dropout.head + origin[2] * dropout.row + origin[3] / 4;
  dropout.shift = static_cast<int>(origin[3] % 4);
  return dropout;
}

int length(int64_t n) {
  STD_TORCH_CHECK(n < INT32_MAX / 2, "the cuda backend takes lengths below 2^30; got ", n);
  return static_cast<int>(n);
}

AttentionParams attention_params(const Tensor& q, const Tensor& k, const Tensor& v, const Terms& terms) {
  AttentionParams p;
  const int64_t kv_heads = k.size(1);
  p.sizes = {length(q.size(0)), length(q.size(1)), kv_heads > 0 ? length(q.size(1) / kv_heads) : 1, length(q.size(2)), length(k.size(2)),
             length(q.size(3)), length(v.size(3))};
  p.mask = mask_params(terms), p.score = score_params(terms), p.dropout = dropout_params(terms, p.sizes);
  p.q = matrix(q), p.k = matrix(k), p.v = matrix(v);
  if (terms.sinks.has_value()) {
    p.sinks = {terms.sinks->data_ptr(), 0, terms.sinks->size(0) == 1 ? 0 : terms.sinks->stride(0), 0, 0};
    p.sinks_dtype = dtype_of(*terms.sinks);
  }
  return p;
}

// stats [2, batch, heads, q_len] holds the rows' largest score and sum of exponentials; behind them may lie a float32 copy of the output.
void set_stats(AttentionParams& p, const Tensor& stats) {
  const int64_t q_len = p.sizes.q_len, rows = static_cast<int64_t>(p.sizes.batch) * p.sizes.heads * q_len;
  p.top = floats_of(stats), p.sum = floats_of(stats) + rows;
  if (stats.size(0) > 2) p.wide = {floats_of(stats) + 2 * rows, p.sizes.heads * q_len, q_len, 1, rows};
}

// Computes keep's summary for the tiles of a pass; the returned tensor has to live until the pass is launched.
Optional summarise(AttentionParams& p, const Terms& terms, Pass pass, DType dtype, cudaStream_t stream) {
  if (!terms.keep.has_value()) return std::nullopt;
  const Tensor& keep = *terms.keep;
  Sizes extent;
  extent.batch = length(keep.size(0)), extent.heads = length(keep.size(1)), extent.q_len = length(keep.size(2)),
  extent.kv_len = length(keep.size(3));
  const TileShape shape = attention_tile_shape(pass, p.sizes, dtype);
  const Tensor summary =
      empty(keep, {extent.batch, extent.heads, (extent.q_len + shape.q - 1) / shape.q, (extent.kv_len + shape.kv - 1) / shape.kv},
            ScalarType::Char);
  p.mask.summary = matrix(summary);
  check(tile_summary(p.mask.keep, p.mask.summary, extent, shape, stream), "the summary of a dense mask");
  return summary;
}

// Writes out; returns lse and stats.
std::tuple<Tensor, Tensor> attention_fwd_op(Tensor q, Tensor k, Tensor v, FUSED_ATTN_TERMS, Tensor out) {
  const Terms terms FUSED_ATTN_TERM_VALUES;
  const OnDevice guard(q);
  AttentionParams p = attention_params(q, k, v, terms);
  const DType dtype = dtype_of(q);
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), value_dim = v.size(3);
  const bool wide = sinks.has_value() && dtype != DType::kFloat;
  const Tensor lse = empty(q, {batch, heads, q_len}, ScalarType::Float);
  const Tensor stats = empty(q, {2 + (wide ? value_dim : 0), batch, heads, q_len}, ScalarType::Float);
  if (batch * heads * q_len == 0) return {lse, stats};
  p.out = matrix(out), p.lse = floats_of(lse);
  set_stats(p, stats);
  const cudaStream_t stream = stream_of(q);
  const Optional summary = summarise(p, terms, Pass::kFwd, dtype, stream);
  check(attention_fwd(p, dtype, stream), "attention_fwd");
  return {lse, stats};
}

constexpr ScalarType kFloats[] = {ScalarType::Half, ScalarType::BFloat16, ScalarType::Float};  // in the order of checks.FLOATS

// probs, scores, max_scores, column_sums, entropy; the request's sixth number is the scores' dtype, 1 to 3, or 0 for that of q.
std::vector<Tensor> attention_aux_op(Tensor q, Tensor k, Tensor v, FUSED_ATTN_TERMS, Tensor stats, std::vector<int64_t> request) {
  const Terms terms FUSED_ATTN_TERM_VALUES;
  const OnDevice guard(q);
  AttentionParams p = attention_params(q, k, v, terms);
  const DType dtype = dtype_of(q);
  const int64_t batch = q.size(0), heads = q.size(1), q_len = q.size(2), kv_len = k.size(2);
  const auto room = [&](int which, std::vector<int64_t> sizes, ScalarType type) {
    return empty(q, request[which] ? sizes : std::vector<int64_t>{0}, type);
  };
  const Tensor probs = room(0, {batch, heads, q_len, kv_len}, q.scalar_type()),
               scores = room(1, {batch, heads, q_len, kv_len}, request[5] > 0 ? kFloats[request[5] - 1] : q.scalar_type());
  const Tensor max_scores = room(2, {batch, heads, q_len}, ScalarType::Float),
               column_sums = room(3, {batch, heads, kv_len}, ScalarType::Float);
  const Tensor entropy = room(4, {batch, heads, q_len}, ScalarType::Float);
  const std::vector<Tensor> result{probs, scores, max_scores, column_sums, entropy};
  if (batch * heads == 0) return result;
  set_stats(p, stats);
  const cudaStream_t stream = stream_of(q);
  const Optional rows_summary = summarise(p, terms, Pass::kRows, dtype, stream);
  p.max_scores = request[2] ? floats_of(max_scores) : nullptr, p.entropy = request[4] ? floats_of(entropy) : nullptr;
  // One launch writes one matrix of scores; the second, where both are wanted, writes nothing else.
  if (q_len > 0 && (request[0] || request[2] || request[4])) {
    if (request[0]) p.probs = matrix(probs);
    check(attention_rows(p, dtype, stream), "attention_rows");
  }
  if (q_len > 0 && request[1]) {
    p.scores = matrix(scores), p.scores_dtype = dtype_of(scores), p.max_scores = nullptr, p.entropy = nullptr;
    check(attention_rows(p, dtype, stream), "attention_rows");
  }
  const Optional columns_summary = request[3] ? summarise(p, terms, Pass::kColumns, dtype, stream) : std::nullopt;
  p.column_sums = request[3] ? floats_of(column_sums) : nullptr;
  if (request[3] && kv_len > 0) check(attention_columns(p, dtype, stream), "attention_columns");
  return result;
}

// Writes the gradient of one bias into `room`, summed over what the bias broadcasts along; where it has one element per row or column of
// the scores, nothing is written: the result then holds the sums over columns or rows of every batch and head, for the caller to go on
// with.
Tensor bias_gradient(AttentionParams p, const Terms& terms, int place, const Tensor& room, DType dtype, cudaStream_t stream) {
  const int64_t batch = p.sizes.batch, heads = p.sizes.heads, q_len = p.sizes.q_len, kv_len = p.sizes.kv_len;
  p.place = place;
  p.over_kv = room.size(3) == 1 && kv_len > 1;
  p.over_q = room.size(2) == 1 && q_len > 1 && !p.over_kv;
  const bool per_head = p.over_q || p.over_kv;
  if (!per_head) p.over_batch = static_cast<int>(batch / room.size(0)), p.over_heads = static_cast<int>(heads / room.size(1));
  const std::vector<int64_t> sizes{batch, heads, p.over_q ? 1 : q_len, p.over_kv ? 1 : kv_len};
  const Tensor sums = empty(room, per_head ? sizes : std::vector<int64_t>{0}, ScalarType::Float);
  const Tensor& written = per_head ? sums : room;
  p.dbias = matrix(written), p.dbias_dtype = dtype_of(written);
  const Optional summary = summarise(p, terms, Pass::kBias, dtype, stream);
  check(attention_bwd_bias(p, dtype, stream), "attention_bwd_bias");
  return sums;
}

// Writes dq, dk and dv where there is room (dk and dv together) and dmods, rooms in the shapes of the modification tensors, without
// elements where no gradient is wanted; returns delta and what bias_gradient left to sum.
std::vector<Tensor> attention_bwd_op(Tensor q, Tensor k, Tensor v, FUSED_ATTN_TERMS, Tensor out, Tensor stats, Optional dout, Optional dlse,
                                     Optional dprobs, Optional dscores, Optional probs, Optional dq, Optional dk, Optional dv,
                                     std::vector<Tensor> dmods) {
  const Terms terms FUSED_ATTN_TERM_VALUES;
  const OnDevice guard(q);
  AttentionParams p = attention_params(q, k, v, terms);
  const DType dtype = dtype_of(q);
  const cudaStream_t stream = stream_of(q);
  set_stats(p, stats);
  const Tensor delta = empty(q, {q.size(0), q.size(1), q.size(2)}, ScalarType::Float);
  p.out = matrix(out), p.dout = matrix(dout), p.dlse = matrix(dlse, 3), p.dprobs = matrix(dprobs), p.dscores = matrix(dscores);
  if (dscores.has_value()) p.dscores_dtype = dtype_of(*dscores);
  p.probs = matrix(probs), p.delta = floats_of(delta), p.dq = matrix(dq), p.dk = matrix(dk), p.dv = matrix(dv);
  check(attention_bwd_delta(p, dtype, stream), "attention_bwd_delta");
  if (dq.has_value()) {
    const Optional summary = summarise(p, terms, Pass::kDq, dtype, stream);
    check(attention_bwd_dq(p, dtype, stream), "attention_bwd_dq");
  }
  if (dk.has_value()) {
    const Optional summary = summarise(p, terms, Pass::kDkdv, dtype, stream);
    check(attention_bwd_dkdv(p, dtype, stream), "attention_bwd_dkdv");
  }
  std::vector<Tensor> result{delta};
  size_t tensor = 0;
  for (int place = 0; place < p.score.count; ++place) {
    if (p.score.mods[place].tensor.data == nullptr) continue;
    const Tensor& room = dmods[tensor++];
    result.push_back(room.numel() > 0 ? bias_gradient(p, terms, place, room, dtype, stream) : empty(room, {0}));
  }
  return result;
}

SoftmaxParams softmax_params(const Tensor& scores, const Terms& terms, bool log, bool uniform_empty) {
  SoftmaxParams p;
  p.sizes = {length(scores.size(0)), length(scores.size(1)), 1, length(scores.size(2)), length(scores.size(3)), 0, 0};
  p.mask = mask_params(terms), p.score = score_params(terms), p.dropout = dropout_params(terms, p.sizes);
  p.x = matrix(scores), p.log = log, p.uniform_empty = uniform_empty;
  return p;
}

// Writes the result; returns, with dropout, the probabilities before it.
Tensor softmax_fwd_op(Tensor scores, FUSED_ATTN_TERMS, bool log, bool uniform_empty, Tensor out) {
  const Terms terms FUSED_ATTN_TERM_VALUES;
  const OnDevice guard(scores);
  SoftmaxParams p = softmax_params(scores, terms, log, uniform_empty);
  const std::vector<int64_t> sizes{scores.size(0), scores.size(1), scores.size(2), scores.size(3)};
  const Tensor probs = empty(scores, seed.has_value() ? sizes : std::vector<int64_t>{0});
  p.out = matrix(out);
  if (seed.has_value()) p.probs = matrix(probs);
  check(softmax_fwd(p, dtype_of(scores), stream_of(scores)), "softmax_fwd");
  return probs;
}

// Rows that one block adds up before partial sums are handed back, and the most elements of partial sums.
constexpr int64_t kRowsPerSplit = 64, kPartialElements = int64_t{1} << 22;

// Writes dscores where there is room; returns float32 partial sums [splits, ...] of the gradient of the bias, without elements unless
// wanted.
Tensor softmax_bwd_op(Tensor scores, FUSED_ATTN_TERMS, Tensor result, Tensor dout, bool log, bool uniform_empty, Optional dscores,
                      bool wants_dbias) {
  const Terms terms FUSED_ATTN_TERM_VALUES;
  const OnDevice guard(scores);
  SoftmaxParams p = softmax_params(scores, terms, log, uniform_empty);
  p.result = matrix(result), p.dout = matrix(dout), p.dx = matrix(dscores);
  Tensor dbias = empty(scores, {0}, ScalarType::Float);
  Optional totals;
  if (wants_dbias) {
    const Tensor& bias = mod_tensors[0];
    const int64_t rows = bias.size(0) * bias.size(1) * bias.size(2), kv_len = scores.size(3);
    const int64_t members = rows > 0 ? scores.size(0) * scores.size(1) * scores.size(2) / rows : 0;
    const int64_t most = kPartialElements / (rows * kv_len > 0 ? rows * kv_len : 1);
    p.bias = {length(bias.size(0)), length(bias.size(1)), 1, length(bias.size(2)), length(kv_len), 0, 0};
    p.bias_splits = static_cast<int>(std::max<int64_t>(1, std::min(members / kRowsPerSplit, most)));
    dbias = torch::stable::new_zeros(bias, {p.bias_splits, bias.size(0), bias.size(1), bias.size(2), bias.size(3)}, ScalarType::Float);
    // A row's probabilities do not change when a constant is added to all its scores: without a key dimension the gradient is 0.
    if (bias.size(3) > 1) {
      p.dbias = floats_of(dbias);
      totals = empty(scores, {2, scores.size(0), scores.size(1), scores.size(2)}, ScalarType::Float);
      p.totals = floats_of(*totals);
    }
  }
  check(softmax_bwd(p, dtype_of(scores), stream_of(scores)), "softmax_bwd");
  return dbias;
}

#define FUSED_ATTN_SCHEMA                                                                                                 \
  "Tensor? q_offset, Tensor? kv_start, Tensor? kv_end, Tensor? keep, Tensor? seed, Tensor? sinks, Tensor[] mod_tensors, " \
  "int[] ints, float[] floats, str mods"

}  // namespace

STABLE_TORCH_LIBRARY(fused_attn_cuda, m) {
  m.def("attention_fwd(Tensor q, Tensor k, Tensor v, " FUSED_ATTN_SCHEMA ", Tensor(a!) out) -> (Tensor lse, Tensor stats)");
  m.def("attention_aux(Tensor q, Tensor k, Tensor v, " FUSED_ATTN_SCHEMA ", Tensor stats, int[] request) -> Tensor[]");
  m.def("attention_bwd(Tensor q, Tensor k, Tensor v, " FUSED_ATTN_SCHEMA
        ", Tensor out, Tensor stats, Tensor? dout, Tensor? dlse, Tensor? dprobs, Tensor? dscores, Tensor? probs, "
        "Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor(d!)[] dmods) -> Tensor[]");
  m.def("softmax_fwd(Tensor scores, " FUSED_ATTN_SCHEMA ", bool log, bool uniform_empty, Tensor(a!) out) -> Tensor");
  m.def("softmax_bwd(Tensor scores, " FUSED_ATTN_SCHEMA
        ", Tensor result, Tensor dout, bool log, bool uniform_empty, Tensor(a!)? dscores, bool wants_dbias) -> Tensor");
  m.def("score_mods() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(fused_attn_cuda, CompositeExplicitAutograd, m) { m.impl("score_mods", TORCH_BOX(&mod_list)); }

STABLE_TORCH_LIBRARY_IMPL(fused_attn_cuda, CUDA, m) {
  m.impl("attention_fwd", TORCH_BOX(&attention_fwd_op));
  m.impl("attention_aux", TORCH_BOX(&attention_aux_op));
  m.impl("attention_bwd", TORCH_BOX(&attention_bwd_op));
  m.impl("softmax_fwd", TORCH_BOX(&softmax_fwd_op));
  m.impl("softmax_bwd", TORCH_BOX(&softmax_bwd_op));
}

}  // namespace fused_attn
