"""Score modifications as the Hopper kernels apply them, on accumulator tiles in either orientation (queries x keys or keys x queries).

A tile of scores is carried as x with a gain > 0 and a lift, the same for all of it: score = x * gain + lift. The scale is
such a gain until something needs the scores themselves, a soft cap leaves the sigmoid that its tanh is made of, and at the end the
exponents take up both: log2 of an exponential is x * factor + lift of ``exponents``. So a scale costs no instruction of its own.
"""

from __future__ import annotations

import functools
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from fused_attn.backends.triton import score_mods
from fused_attn.backends.triton.arguments import Matrix, ScoreArgs
from fused_attn.backends.triton.primitives import base, is_finite, pointers
from fused_attn.lowering import LoweredAttention
from fused_attn.score_mods import on_device

from .eligible import strides_reason

LOG2E = gl.constexpr(1.4426950408889634)
# The sigmoid's form of a soft cap errs by a unit of float32 at the cap, whatever the score is: at 50 by up to 8e-6 (simulator), which the
# error rule still grants the lse of a row with one key. It grants tanh.approx nothing, for its 2^-11 of the score is 100 times as much.
LARGEST_CAP = 50.0


@gluon.jit
def _sigmoid(x):
    """1 / (1 + 2^x), in two instructions of the special function unit."""
    one_more = gl.exp2(x) + 1.0
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [one_more], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softcap(scores, args, at):
    """args: (cap,), at most LARGEST_CAP. tanh(y) = 2 / (1 + exp(-2 y)) - 1."""
    return gl.fma(_sigmoid(scores * (-2.0 * LOG2E / args[0])), 2.0 * args[0], args[0] * -1.0)


@gluon.jit
def _scores(x, gain, lift):
    """x as scores, where gain and lift may be None for 1 and 0; a function cannot return None, for Triton 3.6 makes tensors of all that it does."""
    if gain is not None:
        if lift is not None:
            x = gl.fma(x, gain, lift)
        else:
            x = x * gain
    return x


@gluon.jit
def _capped(x, gain, lift, cap):
    """The sigmoid in cap * tanh(score / cap)."""
    k = -2.0 * LOG2E / cap
    if gain is not None:
        if lift is not None:
            lift = lift * k
        k = gain * k
    return _sigmoid(_scores(x, k, lift))


@gluon.jit
def _sloped(x, gain, args, at):
    """x less a head's slope times the distance."""
    slope = gl.load(base(args[0], at[0], at[1])).to(gl.float32) * -1.0
    if gain is not None:
        slope = slope / gain
    return gl.fma(_distance(at[3] - at[4]).to(gl.float32), slope, x)


@gluon.jit
def _distance(x):
    """|x|, in 32 bits written out: Triton 3.9 makes a maximum of x and -x of it."""
    if x.dtype == gl.int32:
        x = gl.inline_asm_elementwise("abs.s32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)
    else:
        x = gl.abs(x)
    return x


@gluon.jit
def _biased(x, gain, lift, args, at, given):
    """Scores with a bias, of which ``given`` is a tile that somebody has loaded, or None."""
    if given is None:
        given = gl.load(pointers(args[0], at[0], at[1], at[2], at[4]), mask=at[5], other=0.0)
    if gain is not None and lift is None:
        x = gl.fma(x, gain, given.to(gl.float32))
    else:
        x = _scores(x, gain, lift) + given.to(gl.float32)
    return x


@gluon.jit
def _through(s, score, at, tiles, COUNT: gl.constexpr, AS_SCORES: gl.constexpr):
    """x after the first COUNT modifications of raw products s, or the scores that it stands for."""
    x, gain, lift = s, score.scale, None
    for f in gl.static_range(COUNT):
        args = score.mods[f]
        if score.functions[f] is softcap:
            x = _capped(x, gain, lift, args[0])
            gain, lift = 2.0 * args[0], args[0] * -1.0
        elif score.functions[f] is score_mods.alibi:
            x = _sloped(x, gain, args, at)
        else:
            if score.functions[f] is score_mods.bias:
                given = None
                if tiles is not None:
                    given = tiles[f]
                x = _biased(x, gain, lift, args, at, given)
            elif score.functions[f] is score_mods.level:
                x = gl.zeros_like(x)
            else:
                x = score.functions[f](_scores(x, gain, lift), args, at)
            gain, lift = None, None
    if AS_SCORES:
        x = _scores(x, gain, lift)
    return x


@gluon.jit
def modified(s, score, at, tiles=None):
    """What the scale and all modifications make of a tile of raw products, in the unit that ``exponents`` speaks of.

    Args:
        s: float32 accumulator tile.
        score: ``arguments.ScoreArgs`` as ``fast`` returns it.
        at: as in ``score_mods``: (b, h, query indices, query positions, key indices, inside), which broadcast against each other.
        tiles: None, or for each modification a tile of its bias in the layout of s, or None.
    """
    if not score.raw:
        s = _through(s, score, at, tiles, len(score.functions), False)
    return s


@gluon.jit
def whole_scores(s, score, at):
    """The scores themselves of raw products s, those products if ``score.raw``."""
    if not score.raw:
        s = _through(s, score, at, None, len(score.functions), True)
    return s


@gluon.jit
def exponents(score):
    """(factor, lift): log2 of exp(score) is ``modified`` * factor + lift.

    Row statistics in the kernel's unit are (hi + lift) / score.factor, where hi = fl(top * factor); lift is a constant 0 as a rule.
    """
    gain, lift = score.scale, 0.0
    for f in gl.static_range(len(score.functions)):
        if score.functions[f] is softcap:
            gain, lift = 2.0 * score.mods[f][0], score.mods[f][0] * -LOG2E
        elif score.functions[f] is not score_mods.alibi:
            gain, lift = None, 0.0
    factor = score.factor
    if not score.raw and gain is not None:
        factor = gain * LOG2E
    return factor, lift


@gluon.jit
def _pulled_back_through(ds, s, score, at, tiles, F: gl.constexpr):
    """Gradients after modification F as gradients before it."""
    if score.functions[F] is softcap:
        # From its own sigmoid r, which the compiler has from ``modified`` already: 1 - tanh^2 = 4 r (1 - r).
        r = _through(s, score, at, tiles, F + 1, False)
        steep = r * -4.0
        ds = ds * gl.fma(r, steep, steep * -1.0)
    elif score.gradients[F] is not None:
        before = _through(s, score, at, tiles, F, True)
        if score.functions[F] is score_mods.level:
            ds = gl.where(is_finite(before), ds, 0.0)
        else:
            ds = score.gradients[F](ds, before, score.mods[F], at)
    return ds


@gluon.jit
def pulled_back(ds, s, score, at, tiles=None):
    """Gradients of the scores as gradients of the scaled products; s are the raw products, the rest as in ``modified``."""
    for i in gl.static_range(len(score.functions)):
        ds = _pulled_back_through(ds, s, score, at, tiles, len(score.functions) - 1 - i)
    return ds


def fast(score: ScoreArgs) -> ScoreArgs:
    """The same arguments with this module's functions where they are accurate enough."""

    def chosen(value: Any, args: tuple[Any, ...]) -> Any:
        return softcap if value is score_mods.softcap and args[0] <= LARGEST_CAP else value

    return score._replace(functions=tuple(map(chosen, score.functions, score.mods)))


def loaded_bias(call: LoweredAttention) -> tuple[int, Tensor | None]:
    """The one bias of a call and its place, if it has 16 bits and a value per query and key and TMA can load it; else (-1, None)."""
    places = [place for place, mod in enumerate(call.terms.mods) if mod.name == "bias"]
    if len(places) == 1:
        (bias,) = on_device(call.terms.mods[places[0]], call.grid).tensors
        if bias.dtype.itemsize == 2 and bias.shape[2:] == call.shape[2:] and not strides_reason(bias):
            return places[0], bias
    return -1, None


def is_bounded(score: ScoreArgs) -> bool:
    """Whether all scores lie within LARGEST_CAP of 0, which makes a running maximum dispensable where exponentials have float32's range.

    Exponentials of all rows then have the base of a score of 0 and lie within 2^72 of 1 (``store.strayed`` looks at what values make of that).
    Without maximum and rescaling, a forward of head size 128 in bfloat16 saves two instructions per score, which is what the sigmoid costs
    more than tanh.approx.
    """
    return bool(score.functions) and score.functions[-1] is softcap


@gluon.jit
def _trial(out, args, VALUE: gl.constexpr, GRADIENT: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Applies a function of the user's and its gradient to one tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    rows = gl.arange(0, 64, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    q_idx, kv_idx = (cols, rows) if TRANSPOSED else (rows, cols)
    at = (gl.program_id(0), gl.program_id(1), q_idx, q_idx + 1, kv_idx, (q_idx < 9) & (kv_idx < 9))
    x = gl.load(out + rows * 64 + cols)
    y = VALUE(x, args, at)
    if GRADIENT is not None:
        y = GRADIENT(y, x, args, at)
    gl.store(out + rows * 64 + cols, y)


def reasons(score: ScoreArgs) -> list[str]:
    """Why the device functions of modifications cannot be part of a Gluon kernel; empty if they can. score: of the plain kernels."""
    found = (
        _refusal(value, gradient, tuple(map(_kind, args)))
        for value, gradient, args in zip(score.functions, score.gradients, score.mods, strict=True)
        if value not in _OWN
    )
    return [reason for reason in found if reason]


_OWN = (score_mods.softcap, score_mods.alibi, score_mods.bias, score_mods.level)


def _kind(value: Any) -> Any:
    """How a kernel's signature names an argument of a modification."""
    if isinstance(value, Matrix):
        element = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32", "torch.float64": "fp64"}
        dtype = str(value.ptr.dtype)
        return Matrix(f"*{element.get(dtype) or dtype.replace('torch.int', 'i').replace('torch.uint', 'u')}", "i64", "i64", "i64", "i64")
    return "constexpr" if value is None else "fp32"


@functools.lru_cache(maxsize=256)
def _refusal(value: Any, gradient: Any, kinds: tuple[Any, ...]) -> str:
    """Compiles one small kernel in each orientation, for nothing tells beforehand: a ``tl.arange`` has no layout there, for one."""
    for transposed in (False, True):
        constants = {"VALUE": value, "GRADIENT": gradient, "TRANSPOSED": transposed}
        absent = {(1, i): None for i, kind in enumerate(kinds) if kind == "constexpr"}
        signature = {"out": "*fp32", "args": kinds, **dict.fromkeys(constants, "constexpr")}
        source = GluonASTSource(fn=_trial, signature=signature, constexprs=constants | absent)
        try:
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        except Exception as error:  # whatever a compiler may raise about code of others
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            return f"the Triton function {value.__name__} does not compile in Gluon: {str(cause).strip().splitlines()[-1]}"
    return ""
