"""Kernel arguments as named tuples, and how the normal form becomes them.

Triton passes named tuples through to device functions; a ``tl.constexpr`` inside one is a compile-time constant and None removes the
code that would use the part. So every kernel takes the same handful of arguments whatever is switched on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from fused_attn.backends.base import allows_tf32
from fused_attn.backends.triton import score_mods, scorings
from fused_attn.backends.triton.config import TileConfig
from fused_attn.dropout import threshold
from fused_attn.kernel_score import KernelScore
from fused_attn.lowering import Grid, LoweredAttention, Terms
from fused_attn.score_mods import on_device
from fused_attn.scoring import SCORINGS

# 1 / ln 2: exp(x) = exp2(x * LOG2E), and the hardware has exp2.
LOG2E = 1.4426950408889634
# Windows and offsets beyond this reach every key; clamping keeps index arithmetic in 32 bits.
_FAR = 2**30
# Logits in log2 up to which float32's rounding of one, a factor of its row's weights, stays in range: 2^32 there.
_FAR_WEIGHT = 2.0**30
# Smaller scales are 0: they are no float32 of full precision, and float64 to Triton's interpreter.
_SMALLEST = 2.0**-126


class Matrix(NamedTuple):
    """A [batch, heads, rows, cols] tensor: pointer and strides in elements, 0 along dimensions of size 1."""

    ptr: Any
    batch: Any
    head: Any
    row: Any
    col: Any


class MaskArgs(NamedTuple):
    """A KernelMask with its alignment and the per-tile summary of ``keep``; absent parts are None.

    ``dense`` says that ``keep`` is there and ``restricts`` that any part is. A compile-time constant has to come last: Triton 3.6 loses
    the constant strides of a matrix inside a tuple, at the first loop, unless a later constant of that tuple makes it look again.
    """

    left: Any
    right: Any
    shift: Any
    shifts: Any
    kv_start: Any
    kv_end: Any
    keep: Any
    summary: Any
    dense: Any
    restricts: Any


class ScoreArgs(NamedTuple):
    """How scores come from the product: scale, modifications, and the factor that turns their unit into log2 for exp2.

    Rows whose maximum is beyond ``far`` take the factor ``coarse`` instead (``score_tile.base_of``).
    ``scoring`` holds the device functions of what stands in the product's place, None for the product itself; ``by_columns`` says that
    they read q and k themselves. ``sigmoid`` is the bias of a normaliser that is no softmax, in log2.
    """

    scale: Any
    factor: Any
    coarse: Any
    far: Any
    mods: Any
    functions: Any
    gradients: Any
    scoring: Any
    scoring_args: Any
    sigmoid: Any
    by_columns: Any
    raw: Any
    precision: Any


class DropoutArgs(NamedTuple):
    """Seed pointer, the smallest 32-bit word that stays, 1 / (1 - p), and where the call's counters lie (``KernelDropout.counters``).

    Where the call is no part of a larger problem they are constants that nobody reads: its kernels count by its own sizes, and need no
    registers for others. (None in their place is what Triton 3.6 cannot compare the tuple with.)
    ``shift``, what is left of the first key's index modulo 4, is a constant: only 0 lets four neighbours share a Philox call.
    """

    seed: Any
    limit: Any
    factor: Any
    first: Any
    batch: Any
    head: Any
    row: Any
    is_part: Any
    shift: Any


class Sizes(NamedTuple):
    """heads, query heads per key head, q_len, kv_len."""

    heads: Any
    group: Any
    q_len: Any
    kv_len: Any


class Tile(NamedTuple):
    """Compile-time sizes: tile of queries and keys, padded and true head and value dimensions, columns of a row that stay in registers.

    ``has_summary`` says that the summary of ``keep`` is one of such tiles.
    """

    q: Any
    kv: Any
    d: Any
    dv: Any
    head_dim: Any
    value_dim: Any
    resident: Any
    has_summary: Any


def matrix(tensor: Tensor | None) -> Matrix | None:
    """A 4-D tensor as an argument; bool tensors are read as bytes."""
    if tensor is None:
        return None
    data = tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
    return Matrix(data, *(0 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)))


def padded(dim: int) -> int:
    """The power of two, at least 16, that a head dimension is padded to inside a kernel."""
    return max(16, 1 << (dim - 1).bit_length())


def tile(call: LoweredAttention, config: TileConfig, has_summary: bool = True) -> Tile:
    """The compile-time sizes of a pass."""
    head_dim, value_dim = call.q.shape[-1], call.v.shape[-1]
    d, dv = padded(head_dim), padded(value_dim)
    resident = config.resident if call.q.dtype == torch.float32 else max(d, dv)
    values = (config.block_q, config.block_kv, d, dv, head_dim, value_dim, resident, has_summary)
    return Tile(*(tl.constexpr(v) for v in values))


def small_tile(call: LoweredAttention) -> Tile:
    """The sizes of ``mending``: the smallest that tensor cores multiply, and slices of float32 rows."""
    return tile(call, TileConfig(16, 16, 0, 0, 32), has_summary=False)


def sizes(call: LoweredAttention) -> Sizes:
    """The run-time sizes of a call."""
    _, heads, q_len, kv_len = call.shape
    return Sizes(heads, heads // call.k.shape[1], q_len, kv_len)


def _rows(tensor: Tensor | None) -> Matrix | None:
    """Per-row int32 values [batch|1, q_len] as a matrix with one column and one head."""
    return None if tensor is None else matrix(tensor[:, None, :, None])


def _shifts(q_offset: int | Tensor) -> tuple[int, Matrix | None]:
    """Alignment as a number and as one value per batch; the kernels add both."""
    if isinstance(q_offset, Tensor):
        return 0, matrix(q_offset.to(torch.int64)[:, None, None, None])
    return max(-_FAR, min(_FAR, q_offset)), None


def mask(terms: Terms, summary: Tensor | None) -> MaskArgs:
    """The mask and its alignment; windows that reach everything are left out."""
    form = terms.mask
    far = torch.inf if isinstance(terms.q_offset, Tensor) else _FAR
    left, right = (None if x is None or x >= far else x for x in (form.left, form.right))
    parts = (_rows(form.kv_start), _rows(form.kv_end), matrix(form.keep))
    dense, restricts = form.keep is not None, any(part is not None for part in (left, right, *parts))
    return MaskArgs(left, right, *_shifts(terms.q_offset), *parts, matrix(summary), tl.constexpr(dense), tl.constexpr(restricts))


def unit_is_raw(terms: Terms) -> bool:
    """Whether row statistics can stay in the unit of the product: nothing but a positive scale before the softmax."""
    return not terms.mods and terms.sinks is None and terms.scale >= _SMALLEST


def scores(terms: Terms, grid: Grid, dtype: torch.dtype) -> ScoreArgs:
    """Scale, modifications with their device functions, and how products are computed."""
    raw, mods = unit_is_raw(terms), [on_device(m, grid) for m in terms.mods]
    functions = [score_mods.FUNCTIONS[m.name] for m in mods]
    factor = terms.scale * LOG2E if raw else LOG2E
    return ScoreArgs(
        terms.scale if abs(terms.scale) >= _SMALLEST else 0.0,
        factor,
        2.0 ** (math.frexp(factor)[1] - 1),
        _FAR_WEIGHT / factor,
        # None is the constant that has to come last, as in MaskArgs.
        tuple((*m.scalars, *(matrix(t) for t in m.tensors), None) for m in mods),
        tuple(value for value, _ in functions),
        tuple(gradient for _, gradient in functions),
        None if terms.scoring is None else tuple(scorings.FUNCTIONS[terms.scoring.name][:3]),
        None if terms.scoring is None else _scoring_args(terms.scoring, grid),
        None if terms.normalizer is None else terms.normalizer.scalars[0] * LOG2E,
        tl.constexpr(by_columns(terms)),
        tl.constexpr(raw),
        tl.constexpr(_precision(dtype)),
    )


def by_columns(terms: Terms) -> bool:
    """Whether scores are made column by column of q and k, which wants other tiles."""
    return terms.scoring is not None and scorings.FUNCTIONS[terms.scoring.name].by_columns


def _scoring_args(score: KernelScore, grid: Grid) -> tuple[Any, ...]:
    """The numbers of a scoring as floats, its tensors as matrices, and None as in MaskArgs."""
    scoring = SCORINGS[score.name].from_kernel(score)
    return (*map(float, score.scalars), *(matrix(scoring.view(t, grid)) for t in score.tensors), None)


def dropout(terms: Terms, shape: tuple[int, int, int, int]) -> DropoutArgs | None:
    """Seed, threshold, factor and counters of a call of that shape, or None without dropout."""
    if terms.dropout is None:
        return None
    p = terms.dropout.p
    # The largest word is 2^32 - 1; with p = 1 the factor 0 removes what the comparison leaves.
    limit, factor = min(threshold(p), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0
    if terms.dropout.is_whole(shape):
        nothing = tl.constexpr(0)
        return DropoutArgs(terms.dropout.seed, limit, factor, nothing, nothing, nothing, nothing, tl.constexpr(False), nothing)
    numbers, shift = terms.dropout.counters(shape)
    return DropoutArgs(terms.dropout.seed, limit, factor, *numbers, tl.constexpr(True), tl.constexpr(shift))


def _precision(dtype: torch.dtype) -> str:
    """How products of tiles are computed; 16-bit inputs are exact in float32 whatever this says.

    bf16x6 splits each float32 into three bfloat16 and adds the six products that matter: float32's accuracy on tensor cores. Triton's
    scalar alternative ("ieee") keeps whole rows in registers and spills kilobytes from head size 128 on.
    """
    return "tf32" if dtype == torch.float32 and allows_tf32() else "bf16x6" if dtype == torch.float32 else "ieee"
