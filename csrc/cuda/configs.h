// Tile shapes: one table per (pass, bytes per element, head size). A warp owns 16 rows of the tile that stays (queries, or keys in
// dkdv and columns), so the number of warps follows from the shape.
//
// Budgets, at head sizes 64, 128 and 256: shared memory in KB, of the 99 that sm_86, sm_89 and sm_120 give a block; and registers per
// thread on sm_80, sm_90a and sm_120, of 255, the most of any variant (CUDA 13.0); sm_100 takes up to 8 more. tests/test_build.py holds
// ptxas' reports to the registers and allows no spill. float32 dq at head size 128 spills on sm_100 and sm_120 with 32 keys a step.
//
//   pass     16-bit: KB, registers     float32: KB, registers
//   fwd      48  80  96  160 208 255   32  48  64  240 235 240
//   rows     24  48  64  128 128 112   32  48  64  213 184 184
//   dq       48  64  80  216 248 252   48  80  96  232 248 248
//   dkdv     48  64  80  252 248 240   40  80  96  245 216 255
//   columns  16  32  48  104 104  80   32  48  64  184 152 152
//   bias     32  64  96  186 192 160   48  96  96  216 216 168
#pragma once

namespace fused_attn {

enum class Pass { kFwd, kRows, kDq, kDkdv, kColumns, kBias };

// split: how many warps share the columns of a 16-row accumulator, each computing the scores for itself.
struct TileShape {
  int q, kv, stages, split = 1;
};

constexpr int kMaxSharedBytes = 99 * 1024;

constexpr TileShape tile_shape(Pass pass, int bytes, int head_size) {
  const bool wide = bytes == 4;
  const int column = head_size <= 64 ? 0 : head_size <= 128 ? 1 : 2;
  constexpr TileShape kFwd16[] = {{128, 64, 2}, {64, 64, 2}, {64, 32, 2}}, kFwd32[] = {{64, 32, 1}, {64, 16, 1}, {32, 16, 1, 2}};
  constexpr TileShape kRows16[] = {{64, 64, 2}, {64, 64, 2}, {64, 32, 2}}, kRows32[] = {{64, 64, 1}, {64, 32, 1}, {32, 32, 1}};
  constexpr TileShape kDq16[] = {{64, 64, 2}, {64, 64, 1}, {64, 16, 1}}, kDq32[] = {{64, 32, 1}, {64, 16, 1}, {32, 16, 1, 2}};
  constexpr TileShape kDkdv16[] = {{64, 64, 2}, {32, 64, 2}, {16, 64, 1}}, kDkdv32[] = {{16, 64, 1}, {16, 64, 1}, {16, 32, 1}};
  constexpr TileShape kColumns16[] = {{64, 64, 1}, {64, 64, 1}, {32, 64, 1}}, kColumns32[] = {{64, 64, 1}, {32, 64, 1}, {32, 32, 1}};
  constexpr TileShape kBias16[] = {{64, 64, 1}, {64, 64, 1}, {64, 32, 1}}, kBias32[] = {{64, 32, 1}, {64, 32, 1}, {32, 16, 1}};
  switch (pass) {
    case Pass::kFwd: return wide ? kFwd32[column] : kFwd16[column];
    case Pass::kRows: return wide ? kRows32[column] : kRows16[column];
    case Pass::kDq: return wide ? kDq32[column] : kDq16[column];
    case Pass::kDkdv: return wide ? kDkdv32[column] : kDkdv16[column];
    case Pass::kColumns: return wide ? kColumns32[column] : kColumns16[column];
    default: return wide ? kBias32[column] : kBias16[column];
  }
}

}  // namespace fused_attn
