// One kernel per primitive of csrc/include/fused_attn, for tests/test_primitives.py: plain pointers in, plain pointers out, one block.
#include "fused_attn/fragment.cuh"
#include "fused_attn/mask.cuh"
#include "fused_attn/online_softmax.cuh"
#include "fused_attn/philox.cuh"
#include "fused_attn/reduce.cuh"

using namespace fused_attn;

#define KERNEL extern "C" __global__ void

// Lane i copies bytes[i] of its 16.
KERNEL cp_async(uint4* to, const uint4* from, const int* bytes) {
  __shared__ uint4 shared[32];
  ptx::cp_async(&shared[threadIdx.x], from + threadIdx.x, bytes[threadIdx.x]);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  to[threadIdx.x] = shared[threadIdx.x];
}

// A planted fault: nothing waits for the copy.
KERNEL cp_async_unawaited(uint4* to, const uint4* from) {
  __shared__ uint4 shared[32];
  ptx::cp_async(&shared[threadIdx.x], from + threadIdx.x, 16);
  ptx::cp_async_commit();
  to[threadIdx.x] = shared[threadIdx.x];
}

// from [16, 16] of 16 bits; to [2, 32, 4] registers, as it is and transposed.
KERNEL ldmatrix(uint32_t* to, const uint16_t* from) {
  __shared__ __align__(16) uint16_t shared[16][16];
  for (int i = threadIdx.x; i < 256; i += 32) shared[i / 16][i % 16] = from[i];
  __syncthreads();
  uint32_t r[4], t[4];
  const void* row = &shared[threadIdx.x % 16][threadIdx.x / 16 * 8];
  ptx::ldmatrix_x4(r, row);
  ptx::ldmatrix_x4_trans(t, row);
  for (int i = 0; i < 4; ++i) to[threadIdx.x * 4 + i] = r[i], to[128 + threadIdx.x * 4 + i] = t[i];
}

// d [16, 8] = a [16, 16] b [16, 8] with the registers filled as ptx/mma.cuh says.
template <class T>
__device__ void mma(float* d, const T* a, const T* b) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  const auto pair = [](T x, T y) {
    return *reinterpret_cast<uint16_t*>(&x) | static_cast<uint32_t>(*reinterpret_cast<uint16_t*>(&y)) << 16;
  };
  uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) {
    const T* p = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fa[i] = pair(p[0], p[1]);
  }
  for (int i = 0; i < 2; ++i) fb[i] = pair(b[(2 * t + i * 8) * 8 + g], b[(2 * t + 1 + i * 8) * 8 + g]);
  float acc[4] = {};
  ptx::mma_m16n8k16<T>(acc, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = acc[i];
}
KERNEL mma_half(float* d, const half* a, const half* b) { mma(d, a, b); }
KERNEL mma_bfloat16(float* d, const bfloat16* a, const bfloat16* b) { mma(d, a, b); }

KERNEL ex2(float* to, const float* from) { to[threadIdx.x] = ptx::ex2(from[threadIdx.x]); }

// Rows [first, first + 32) of a matrix through a tile [32, 64] to `to` (what the tile holds, row by row) and to another matrix. The source
// is the second head of a tensor that begins at no multiple of 16 bytes.
template <class T>
__device__ void tile(T* to, int* broken, T* back, T* from, int row_stride, int col_stride, int low, int high, int cols, int first) {
  __shared__ __align__(128) unsigned char shared[32 * 64 * sizeof(T)];
  const SharedTile<T, 32, 64> tile(shared);
  Matrix source, target;
  source.data = from - 3, source.head = 3, source.row = row_stride, source.col = col_stride;
  target.data = back, target.row = cols, target.col = 1;
  tile.template load<64>(RowSource<T>{source, 0, 1, low, high, cols}, first);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int i = threadIdx.x; i < 32 * 64; i += 64) to[i] = *tile.at(i / 64, i % 64);
  __syncthreads();
  const bool found = tile.template has_broken<64, true>();
  *broken = __syncthreads_or(found);
  tile.template store<64>(RowSource<T>{target, 0, 0, 0, high, cols}, first);
}
#define TILE(T)                                                                                                                   \
  KERNEL tile_##T(T* to, int* broken, T* back, T* from, int row_stride, int col_stride, int low, int high, int cols, int first) { \
    tile<T>(to, broken, back, from, row_stride, col_stride, low, high, cols, first);                                              \
  }
TILE(float)
TILE(half)
TILE(bfloat16)

// s [16, 32] = a [16, 64] b^T, acc [16, 64] = s b, for b [32, 64]; one warp.
template <class T>
__device__ void product(float* s_out, float* acc_out, T* a, T* b) {
  __shared__ __align__(128) unsigned char shared[48 * 64 * sizeof(T)];
  const SharedTile<T, 16, 64> a_tile(shared);
  const SharedTile<T, 32, 64> b_tile(shared + 16 * 64 * sizeof(T));
  const Matrix a_matrix{a, 0, 0, 64, 1}, b_matrix{b, 0, 0, 64, 1};
  a_tile.template load<32>(RowSource<T>{a_matrix, 0, 0, 0, 16, 64}, 0);
  b_tile.template load<32>(RowSource<T>{b_matrix, 0, 0, 0, 32, 64}, 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float s[4][4], acc[8][4] = {};
  multiply_transposed<T, 64>(s, a_tile, 0, b_tile);
  multiply_add<T>(acc, s, b_tile);
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  for (int e = 0; e < 4; ++e) {
    for (int n = 0; n < 4; ++n) s_out[(g + e / 2 * 8) * 32 + n * 8 + 2 * t + e % 2] = s[n][e];
    for (int n = 0; n < 8; ++n) acc_out[(g + e / 2 * 8) * 64 + n * 8 + 2 * t + e % 2] = acc[n][e];
  }
}
KERNEL product_float(float* s, float* acc, float* a, float* b) { product(s, acc, a, b); }
KERNEL product_half(float* s, float* acc, half* a, half* b) { product(s, acc, a, b); }
KERNEL product_bfloat16(float* s, float* acc, bfloat16* a, bfloat16* b) { product(s, acc, a, b); }

// to [2, threads]: each thread's sum and maximum over its group of kLanes.
template <int kLanes>
__device__ void reduce_both(float* to, const float* from) {
  __shared__ float scratch[32];
  to[threadIdx.x] = reduce<Sum, kLanes>(from[threadIdx.x], scratch);
  to[blockDim.x + threadIdx.x] = reduce<Max, kLanes>(from[threadIdx.x], scratch);
}
KERNEL reduce_2(float* to, const float* from) { reduce_both<2>(to, from); }
KERNEL reduce_8(float* to, const float* from) { reduce_both<8>(to, from); }
KERNEL reduce_32(float* to, const float* from) { reduce_both<32>(to, from); }
KERNEL reduce_128(float* to, const float* from) { reduce_both<128>(to, from); }
KERNEL reduce_1024(float* to, const float* from) { reduce_both<1024>(to, from); }

// to [4, 32]: maximum and sum of each four lanes, exp(score - top) and the score in natural units, for a scale that may stay in the
// exponent.
KERNEL online_softmax(float* to, const float* from, float top, float scale) {
  ScoreParams params;
  params.scale = scale, params.raw = scale > 0.f;
  const float x = from[threadIdx.x];
  const Scorer<true> scorer(params);
  const float score = scorer.score(x, {0, 0, 0, 0});
  to[threadIdx.x] = quad_max(x);
  to[32 + threadIdx.x] = quad_sum(x);
  to[64 + threadIdx.x] = scorer.exponential(score, scorer.score(top, {0, 0, 0, 0}));
  to[96 + threadIdx.x] = scorer.natural(score);
}

// intervals [q_len + 1, 2] of batch b; allowed [q_len, kv_len] with keep; states of 2 x 2 tiles.
KERNEL mask(int* intervals, int* allowed, int* states, const int64_t* shifts, int* kv_start, int* kv_end, uint8_t* keep, int8_t* summary,
            int left, int right, int shift, int per_batch, int q_len, int kv_len, int b) {
  Sizes sizes;
  sizes.q_len = q_len, sizes.kv_len = kv_len;
  MaskParams mask;
  mask.left = left, mask.right = right, mask.alignment = {shift, per_batch ? shifts : nullptr};
  mask.kv_start = {kv_start, q_len, 0, 1, 0}, mask.kv_end = {kv_end, q_len, 0, 1, 0};
  mask.keep = {keep, static_cast<int64_t>(q_len) * kv_len, 0, kv_len, 1}, mask.summary = {summary, 4, 0, 2, 1};
  for (int q = threadIdx.x; q <= q_len; q += blockDim.x) {
    const Interval keys = row_interval(mask, b, q, sizes);
    intervals[2 * q] = keys.empty() ? 0 : keys.start, intervals[2 * q + 1] = keys.empty() ? 0 : keys.end;
    for (int kv = 0; q < q_len && kv < kv_len; ++kv) allowed[q * kv_len + kv] = keys.contains(kv) && kept(mask, b, 0, q, kv);
  }
  if (threadIdx.x < 4) states[threadIdx.x] = tile_state(mask, b, 0, threadIdx.x / 2, threadIdx.x % 2);
}

// Scores and gradients of products [q_len, 32] (lane = key) with softcap, ALiBi of one slope and a bias, in an order given as kinds.
KERNEL score_mod(float* scores, float* grads, const float* products, float* slope, half* bias, const int* kinds, int count, float cap,
                 int shift, int q_len, int down_to) {
  ScoreParams params;
  params.count = count, params.alignment.shift = shift;
  for (int i = 0; i < count; ++i) {
    ScoreMod& mod = params.mods[i];
    mod.kind = static_cast<ModKind>(kinds[i]), mod.scalar = cap;
    if (mod.kind == ModKind::kALiBi) mod.tensor = {slope, 0, 0, 0, 0};
    if (mod.kind == ModKind::kBias) mod.tensor = {bias, 0, 0, 32, 1}, mod.dtype = DType::kHalf;
  }
  for (int q = 0; q < q_len; ++q) {
    const int kv = threadIdx.x, i = q * 32 + kv;
    const Place place{0, 0, q, kv};
    scores[i] = apply(params, products[i], place, count);
    grads[i] = pull_back(params, 1.f, products[i], place, down_to);
  }
}

// words [rows, kv_len] and factors [rows, kv_len] of heads numbered from `row` on, whose keys begin at `shift`.
KERNEL philox(uint32_t* words, float* factors, const int64_t* seed, int64_t row, int rows, int kv_len, int shift, unsigned limit,
              float factor) {
  DropoutParams dropout;
  dropout.seed = seed, dropout.limit = limit, dropout.factor = factor, dropout.shift = shift;
  dropout.head = (kv_len + shift + 3) / 4, dropout.first = row * dropout.head;
  for (int i = threadIdx.x; i < rows * kv_len; i += blockDim.x) {
    const int kv = i % kv_len, key = kv + shift;
    const uint4 w = philox((row + i / kv_len) * dropout.head + key / 4, *seed);
    const uint32_t all[4] = {w.x, w.y, w.z, w.w};
    words[i] = all[key % 4];
    if (is_kept(dropout, dropout_words(dropout, 0, i / kv_len, 0, kv), kv) != (words[i] >= limit)) words[i] = 0;
    factors[i] = kept_keys<4>(dropout, 0, i / kv_len, 0, kv / 4 * 4) >> kv % 4 & 1 ? factor : 0.f;
  }
}

// A number through each dtype's store and load, [3, 32].
KERNEL tensor(float* to, const float* from, half* h, bfloat16* b, float* f) {
  const Matrix matrices[3] = {{h, 0, 0, 0, 1}, {b, 0, 0, 0, 1}, {f, 0, 0, 0, 1}};
  const int i = threadIdx.x;
  for (int d = 0; d < 3; ++d) {
    store(matrices[d], static_cast<DType>(d), 0, 0, 0, i, from[i]);
    to[d * 32 + i] = load(matrices[d], static_cast<DType>(d), 0, 0, 0, i);
  }
}
