"""Bad input: every case is a clear error of the right type by one pattern, and names what is wrong."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.bias import causal_lower_right

import fused_attn as fa
import fused_attn.nn
from fused_attn import backends
from fused_attn.checks import require_device
from fused_attn.integrations import flash_registry
from fused_attn.masks import Mask
from fused_attn.nn import d2l, keras, x_transformers
from fused_attn.problem import AttentionProblem
from fused_attn.score_mods import ScoreMod
from fused_attn.torch_sdpa import ArgumentError, ArgumentTypeError

pytestmark = pytest.mark.quick

# What must hold; got what was got. What to do.
PATTERN = re.compile(r"^(?P<hold>\S.+); got (?P<got>.+?)\. (?P<todo>\S.{7,})[.)]$", re.DOTALL)
NAN, INF = float("nan"), float("inf")


def explains(error: BaseException, name: str) -> bool:
    """Whether a message follows the pattern and names the argument before "; got"."""
    match = PATTERN.match(str(error))
    return match is not None and name.lower() in match["hold"].lower()


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def attend(q=None, k=None, v=None, **options):
    """A valid call (B=2, H=4, kv_heads=2, Lq=Lk=6, D=8) with some arguments replaced."""
    q = t(2, 4, 6, 8) if q is None else q
    k = t(2, 2, 6, 8) if k is None else k
    return fa.attention(q, k, t(2, 2, 6, 8) if v is None else v, **{"backend": "eager", **options})


def longer(**options):
    """q_len = 6 against kv_len = 9."""
    return attend(k=t(2, 2, 9, 8), v=t(2, 2, 9, 8), **options)


def soften(scores=None, mask=None, **options):
    return fa.masked_softmax(t(2, 3, 5) if scores is None else scores, mask, **{"backend": "eager", **options})


def sdpa(q=None, k=None, v=None, *rest, **options):
    return fa.scaled_dot_product_attention(*(t(2, 4, 6, 8) if x is None else x for x in (q, k, v)), *rest, **options)


class NoKeep(Mask):
    """Forgot its meaning."""


class FloatKeep(Mask):
    def keep(self, grid):
        return torch.ones(grid.shape)


class WideKeep(Mask):
    def keep(self, grid):
        return torch.ones(7, 7, dtype=torch.bool)


@dataclass(frozen=True)
class NoApply(ScoreMod):
    """Forgot its meaning, too."""


class Odd:
    """Nothing that any argument accepts."""


MASK = t(6, 6, dtype=torch.bool)
GROW = torch.ones(2, requires_grad=True)

# id: (call, exception, name that the message must contain before "; got")
ATTENTION = {
    "q-none": (lambda: fa.attention(None, t(1, 1, 2, 2), t(1, 1, 2, 2)), TypeError, "q"),
    "q-list": (lambda: attend(q=[[1.0]]), TypeError, "q"),
    "k-numpy": (lambda: attend(k=np.zeros((2, 2, 6, 8), np.float32)), TypeError, "k"),
    "v-string": (lambda: attend(v="v"), TypeError, "v"),
    "q-int": (lambda: attend(q=t(2, 4, 6, 8, dtype=torch.int64)), TypeError, "q"),
    "q-bool": (lambda: attend(q=t(2, 4, 6, 8, dtype=torch.bool)), TypeError, "q"),
    "q-complex": (lambda: attend(q=t(2, 4, 6, 8, dtype=torch.complex64)), TypeError, "q"),
    "k-float8": (lambda: attend(k=t(2, 2, 6, 8).to(torch.float8_e4m3fn)), TypeError, "k"),
    "q-sparse": (lambda: attend(q=t(2, 4, 6, 8).to_sparse()), TypeError, "q"),
    "q-nested-strided": (lambda: attend(q=torch.nested.nested_tensor([t(4, 6, 8), t(4, 5, 8)])), TypeError, "q"),
    "q-nested-jagged": (lambda: attend(q=torch.nested.nested_tensor([t(4, 8), t(5, 8)], layout=torch.jagged)), TypeError, "q"),
    "q-0d": (lambda: attend(q=torch.tensor(1.0)), ValueError, "q"),
    "q-3d": (lambda: attend(q=t(2, 6, 8)), ValueError, "q"),
    "k-5d": (lambda: attend(k=t(1, 2, 2, 6, 8)), ValueError, "k"),
    "v-3d": (lambda: attend(v=t(2, 6, 8)), ValueError, "v"),
    "dtypes-differ": (lambda: attend(k=t(2, 2, 6, 8, dtype=torch.float16)), TypeError, "k"),
    "v-dtype-differs": (lambda: attend(v=t(2, 2, 6, 8, dtype=torch.float64)), TypeError, "v"),
    "devices-differ": (lambda: attend(k=t(2, 2, 6, 8, device="meta")), ValueError, "device"),
    "batch-differs": (lambda: attend(q=t(3, 4, 6, 8)), ValueError, "batch"),
    "v-batch-differs": (lambda: attend(v=t(1, 2, 6, 8)), ValueError, "batch"),
    "head-dims-differ": (lambda: attend(q=t(2, 4, 6, 16)), ValueError, "head_dim"),
    "kv-len-differs": (lambda: attend(v=t(2, 2, 7, 8)), ValueError, "kv_len"),
    "kv-heads-differ": (lambda: attend(v=t(2, 4, 6, 8)), ValueError, "kv_heads"),
    "heads-not-divisible": (lambda: attend(q=t(2, 5, 6, 8)), ValueError, "kv_heads"),
    "fewer-heads-than-kv": (lambda: attend(q=t(2, 1, 6, 8)), ValueError, "kv_heads"),
    "kv-heads-zero": (lambda: attend(k=t(2, 0, 6, 8), v=t(2, 0, 6, 8)), ValueError, "kv_heads"),
    "scale-nan": (lambda: attend(scale=NAN), ValueError, "scale"),
    "scale-inf": (lambda: attend(scale=-INF), ValueError, "scale"),
    "scale-huge-int": (lambda: attend(scale=10**400), ValueError, "scale"),
    "scale-tensor": (lambda: attend(scale=torch.tensor(0.5)), TypeError, "scale"),
    "scale-string": (lambda: attend(scale="0.5"), TypeError, "scale"),
    "scale-bool": (lambda: attend(scale=True), TypeError, "scale"),
    "scale-complex": (lambda: attend(scale=1j), TypeError, "scale"),
    "scale-array": (lambda: attend(scale=np.ones(1)), TypeError, "scale"),
    "offset-float": (lambda: longer(mask=fa.Causal(), q_offset=1.0), TypeError, "q_offset"),
    "offset-bool": (lambda: longer(mask=fa.Causal(), q_offset=True), TypeError, "q_offset"),
    "offset-string": (lambda: longer(mask=fa.Causal(), q_offset="bottom-right"), TypeError, "q_offset"),
    "offset-list": (lambda: longer(mask=fa.Causal(), q_offset=[0, 1]), TypeError, "q_offset"),
    "offset-array": (lambda: longer(mask=fa.Causal(), q_offset=np.array([0, 1])), TypeError, "q_offset"),
    "offset-float-tensor": (lambda: longer(mask=fa.Causal(), q_offset=t(2)), TypeError, "q_offset"),
    "offset-bool-tensor": (lambda: longer(mask=fa.Causal(), q_offset=t(2, dtype=torch.bool)), TypeError, "q_offset"),
    "offset-wrong-batch": (lambda: longer(mask=fa.Causal(), q_offset=t(3, dtype=torch.int64)), ValueError, "q_offset"),
    "offset-0d-tensor": (lambda: longer(mask=fa.Causal(), q_offset=torch.tensor(3)), ValueError, "q_offset"),
    "offset-other-device": (lambda: longer(mask=fa.Causal(), q_offset=t(2, dtype=torch.int64, device="meta")), ValueError, "q_offset"),
    "offset-huge": (lambda: longer(mask=fa.Causal(), q_offset=10**30), ValueError, "q_offset"),
    "offset-wrong-though-unused": (lambda: attend(q_offset=0.5), TypeError, "q_offset"),
    "mods-alone": (lambda: attend(score_mods=fa.SoftCap(3.0)), TypeError, "score_mods"),
    "mods-tensor": (lambda: attend(score_mods=t(6, 6)), TypeError, "score_mods"),
    "mods-string": (lambda: attend(score_mods="softcap"), TypeError, "score_mods"),
    "mods-none": (lambda: attend(score_mods=None), TypeError, "score_mods"),
    "mods-hold-tensor": (lambda: attend(score_mods=(t(6, 6),)), TypeError, "score_mods"),
    "mods-hold-mask": (lambda: attend(score_mods=(fa.Causal(),)), TypeError, "score_mods"),
    "mods-nested": (lambda: attend(score_mods=((fa.SoftCap(3.0),),)), TypeError, "score_mods"),
    "mods-class": (lambda: attend(score_mods=(fa.SoftCap,)), TypeError, "score_mods"),
    "mods-generator": (lambda: attend(score_mods=(m for m in ())), TypeError, "score_mods"),
    "mod-without-apply": (lambda: attend(score_mods=(NoApply(),)), TypeError, "apply"),
    "sinks-number": (lambda: attend(sinks=0.0), TypeError, "sinks"),
    "sinks-list": (lambda: attend(sinks=[0.0] * 4), TypeError, "sinks"),
    "sinks-int": (lambda: attend(sinks=t(4, dtype=torch.int32)), TypeError, "sinks"),
    "sinks-per-kv-head": (lambda: attend(sinks=t(2)), ValueError, "sinks"),
    "sinks-2d": (lambda: attend(sinks=t(2, 4)), ValueError, "sinks"),
    "sinks-other-device": (lambda: attend(sinks=t(4, device="meta")), ValueError, "sinks"),
    "dropout-number": (lambda: attend(dropout=0.1), TypeError, "dropout"),
    "dropout-class": (lambda: attend(dropout=fa.Dropout), TypeError, "dropout"),
    "aux-bool": (lambda: attend(return_aux=True), TypeError, "return_aux"),
    "aux-names": (lambda: attend(return_aux=("probs",)), TypeError, "return_aux"),
    "aux-class": (lambda: attend(return_aux=fa.AuxRequest), TypeError, "return_aux"),
    "aux-field-int": (lambda: fa.AuxRequest(probs=1), TypeError, "probs"),
    "aux-field-string": (lambda: fa.AuxRequest(lse="yes"), TypeError, "lse"),
    "backend-unknown": (lambda: attend(backend="tpu"), ValueError, "backend"),
    "backend-none": (lambda: attend(backend=None), ValueError, "backend"),
    "backend-list": (lambda: attend(backend=["cpu"]), ValueError, "backend"),
    "backend-array": (lambda: attend(backend=np.array(["cpu", "eager"])), ValueError, "backend"),
    "explain-3d": (lambda: fa.explain(t(4, 6, 8), t(4, 6, 8), t(4, 6, 8)), ValueError, "q"),
    "explain-mask-string": (lambda: fa.explain(*(t(1, 1, 6, 8),) * 3, mask="causal"), TypeError, "mask"),
}

MASKS = {
    "string": (lambda: attend(mask="causal"), TypeError, "mask"),
    "true": (lambda: attend(mask=True), TypeError, "mask"),
    "list": (lambda: attend(mask=[fa.Causal()]), TypeError, "mask"),
    "class": (lambda: attend(mask=fa.Causal), TypeError, "mask"),
    "array": (lambda: attend(mask=np.ones((6, 6), bool)), TypeError, "mask"),
    "score-mod": (lambda: attend(mask=fa.SoftCap(2.0)), TypeError, "mask"),
    "float": (lambda: attend(mask=t(6, 6)), TypeError, "mask"),
    "int": (lambda: attend(mask=t(6, 6, dtype=torch.int32)), TypeError, "mask"),
    "sparse": (lambda: attend(mask=MASK.to_sparse()), TypeError, "mask"),
    "not-broadcastable": (lambda: attend(mask=t(5, 6, dtype=torch.bool)), ValueError, "mask"),
    "per-kv-head": (lambda: attend(mask=t(2, 2, 6, 6, dtype=torch.bool)), ValueError, "mask"),
    "5d": (lambda: attend(mask=t(1, 1, 1, 6, 6, dtype=torch.bool)), ValueError, "mask"),
    "other-device": (lambda: attend(mask=t(6, 6, dtype=torch.bool, device="meta")), ValueError, "mask"),
    "requires-grad": (lambda: attend(mask=fa.ValidLengths(GROW)), ValueError, "mask"),
    "requires-grad-nested": (lambda: attend(mask=fa.Causal() & fa.ValidLengths(GROW)), ValueError, "mask"),
    "and-number": (lambda: fa.Causal() & 3, TypeError, "mask"),
    "and-class": (lambda: fa.Causal() & fa.Causal, TypeError, "mask"),
    "and-float-tensor": (lambda: fa.Causal() & t(6, 6), TypeError, "mask"),
    "list-and": (lambda: [True] & fa.Causal(), TypeError, "mask"),
    "no-keep": (lambda: attend(mask=NoKeep()), TypeError, "keep"),
    "keep-float": (lambda: attend(mask=FloatKeep()), TypeError, "FloatKeep.keep"),
    "keep-wide": (lambda: attend(mask=WideKeep() & fa.Causal()), ValueError, "WideKeep.keep"),
    "keep-wide-lowered": (
        lambda: WideKeep().lower(grid := AttentionProblem.check(*(t(1, 1, 6, 8),) * 3, OPTIONS).grid).settled(grid),
        ValueError,
        "WideKeep.keep",
    ),
    "dense-list": (lambda: fa.Dense([[True]]), TypeError, "mask"),
    "dense-float": (lambda: fa.Dense(t(6, 6)), TypeError, "mask"),
    "window-negative-left": (lambda: fa.SlidingWindow(-1, 0), ValueError, "left"),
    "window-negative-right": (lambda: fa.SlidingWindow(0, -1), ValueError, "right"),
    "window-float": (lambda: fa.SlidingWindow(1.5, 0), TypeError, "left"),
    "window-bool": (lambda: fa.SlidingWindow(0, True), TypeError, "right"),
    "window-tensor": (lambda: fa.SlidingWindow(torch.tensor(3), 0), TypeError, "left"),
    "window-numpy": (lambda: fa.SlidingWindow(np.array([3, 4]), 0), TypeError, "left"),
    "window-huge": (lambda: fa.SlidingWindow(10**30, 0), ValueError, "left"),
    "window-object": (lambda: fa.SlidingWindow(Odd(), 0), TypeError, "left"),
    "band-zero": (lambda: fa.Band(0), ValueError, "width"),
    "band-none": (lambda: fa.Band(None), TypeError, "width"),
    "band-nan": (lambda: fa.Band(NAN), TypeError, "width"),
    "lens-list": (lambda: fa.ValidLengths([1, 2]), TypeError, "lens"),
    "lens-bool": (lambda: fa.ValidLengths(t(2, dtype=torch.bool)), TypeError, "lens"),
    "lens-complex": (lambda: fa.ValidLengths(t(2, dtype=torch.complex64)), TypeError, "lens"),
    "lens-uint64": (lambda: fa.ValidLengths(t(2, dtype=torch.uint64)), TypeError, "lens"),
    "lens-0d": (lambda: fa.ValidLengths(torch.tensor(3)), ValueError, "lens"),
    "lens-3d": (lambda: fa.ValidLengths(t(2, 1, 6)), ValueError, "lens"),
    "lens-wrong-batch": (lambda: attend(mask=fa.ValidLengths(t(3))), ValueError, "lens"),
    "lens-wrong-q-len": (lambda: attend(mask=fa.ValidLengths(t(2, 5))), ValueError, "lens"),
    "lens-other-device": (lambda: attend(mask=fa.ValidLengths(t(2, device="meta"))), ValueError, "lens"),
    "padding-int": (lambda: fa.KeyPadding(t(2, 6, dtype=torch.int64)), TypeError, "KeyPadding"),
    "padding-list": (lambda: fa.KeyPadding([[True]]), TypeError, "KeyPadding"),
    "padding-1d": (lambda: attend(mask=fa.KeyPadding(t(6, dtype=torch.bool))), ValueError, "KeyPadding"),
    "padding-wrong-length": (lambda: attend(mask=fa.KeyPadding(t(2, 7, dtype=torch.bool))), ValueError, "KeyPadding"),
    "documents-float": (lambda: fa.Documents(t(6)), TypeError, "ids"),
    "documents-scattered": (lambda: fa.Documents(torch.tensor([0, 1, 0])), ValueError, "ids"),
    "documents-3d": (lambda: fa.Documents(t(1, 1, 6, dtype=torch.int64)), ValueError, "ids"),
    "documents-wrong-length": (lambda: attend(mask=fa.Documents(t(5, dtype=torch.int64))), ValueError, "ids"),
    "documents-wrong-batch": (lambda: attend(mask=fa.Documents(t(3, 6, dtype=torch.int64))), ValueError, "ids"),
    "cu-list": (lambda: fa.Documents.from_cu_seqlens([0, 3]), TypeError, "cu_seqlens"),
    "cu-float": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([0.0, 3.0])), TypeError, "cu_seqlens"),
    "cu-starts-late": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([1, 3])), ValueError, "cu_seqlens"),
    "cu-falls": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([0, 5, 3])), ValueError, "cu_seqlens"),
    "cu-too-short": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([0])), ValueError, "cu_seqlens"),
    "cu-2d": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([[0, 3]])), ValueError, "cu_seqlens"),
    "cu-meta-without-total": (lambda: fa.Documents.from_cu_seqlens(t(3, dtype=torch.int32, device="meta")), ValueError, "total"),
    "cu-total-float": (lambda: fa.Documents.from_cu_seqlens(torch.tensor([0, 3]), total=3.0), TypeError, "total"),
    "prefix-negative": (lambda: fa.PrefixLM(-1), ValueError, "prefix"),
    "prefix-float": (lambda: fa.PrefixLM(1.0), TypeError, "prefix"),
    "prefix-float-tensor": (lambda: fa.PrefixLM(t(2)), TypeError, "prefix"),
    "prefix-wrong-batch": (lambda: attend(mask=fa.PrefixLM(t(3, dtype=torch.int64))), ValueError, "prefix"),
}

OPTIONS = {"mask": None, "scale": None, "q_offset": None, "score_mods": (), "sinks": None, "dropout": None, "return_aux": None}

MODS = {
    "cap-zero": (lambda: fa.SoftCap(0.0), ValueError, "cap"),
    "cap-negative": (lambda: fa.SoftCap(-1), ValueError, "cap"),
    "cap-nan": (lambda: fa.SoftCap(NAN), ValueError, "cap"),
    "cap-inf": (lambda: fa.SoftCap(INF), ValueError, "cap"),
    "cap-tensor": (lambda: fa.SoftCap(torch.tensor(3.0)), TypeError, "cap"),
    "cap-bool": (lambda: fa.SoftCap(True), TypeError, "cap"),
    "cap-string": (lambda: fa.SoftCap("30"), TypeError, "cap"),
    "cap-none": (lambda: fa.SoftCap(None), TypeError, "cap"),
    "slopes-list": (lambda: fa.ALiBi([0.5]), TypeError, "slopes"),
    "slopes-int": (lambda: fa.ALiBi(t(4, dtype=torch.int64)), TypeError, "slopes"),
    "slopes-0d": (lambda: fa.ALiBi(torch.tensor(0.5)), ValueError, "slopes"),
    "slopes-per-kv-head": (lambda: attend(score_mods=(fa.ALiBi(t(2)),)), ValueError, "slopes"),
    "slopes-wrong-batch": (lambda: attend(score_mods=(fa.ALiBi(t(3, 4)),)), ValueError, "slopes"),
    "slopes-4d": (lambda: attend(score_mods=(fa.ALiBi(t(2, 4, 6, 6)),)), ValueError, "slopes"),
    "bias-bool": (lambda: fa.Bias(MASK), TypeError, "Bias"),
    "bias-int": (lambda: fa.Bias(t(6, 6, dtype=torch.int8)), TypeError, "Bias"),
    "bias-number": (lambda: fa.Bias(1.0), TypeError, "Bias"),
    "bias-complex": (lambda: fa.Bias(t(6, 6, dtype=torch.complex64)), TypeError, "Bias"),
    "bias-sparse": (lambda: fa.Bias(t(6, 6).to_sparse()), TypeError, "Bias"),
    "bias-not-broadcastable": (lambda: attend(score_mods=(fa.Bias(t(4, 6)),)), ValueError, "Bias"),
    "bias-5d": (lambda: attend(score_mods=(fa.Bias(t(1, 1, 1, 6, 6)),)), ValueError, "Bias"),
    "bias-other-device": (lambda: attend(score_mods=(fa.Bias(t(6, 6, device="meta")),)), ValueError, "Bias"),
    "decay-list": (lambda: fa.DecayBias([0.0]), TypeError, "DecayBias"),
    "decay-0d": (lambda: attend(score_mods=(fa.DecayBias(torch.tensor(0.0)),)), ValueError, "DecayBias"),
    "decay-wrong-length": (lambda: attend(score_mods=(fa.DecayBias(t(1, 4, 5)),)), ValueError, "DecayBias"),
    "decay-wrong-heads": (lambda: attend(score_mods=(fa.DecayBias(t(1, 3, 6)),)), ValueError, "DecayBias"),
    "decay-4d": (lambda: attend(score_mods=(fa.DecayBias(t(1, 1, 4, 6)),)), ValueError, "DecayBias"),
    "decay-beyond-keys": (lambda: longer(score_mods=(fa.DecayBias(t(1, 4, 9)),), q_offset=4), ValueError, "q_offset"),
    "decay-before-keys": (lambda: longer(score_mods=(fa.DecayBias(t(1, 4, 9)),), q_offset=-1), ValueError, "q_offset"),
    "dropout-p-above-1": (lambda: fa.Dropout(1.5), ValueError, "p"),
    "dropout-p-negative": (lambda: fa.Dropout(-0.1), ValueError, "p"),
    "dropout-p-nan": (lambda: fa.Dropout(NAN), ValueError, "p"),
    "dropout-p-string": (lambda: fa.Dropout("0.1"), TypeError, "p"),
    "dropout-p-bool": (lambda: fa.Dropout(True), TypeError, "p"),
    "dropout-p-tensor": (lambda: fa.Dropout(torch.tensor(0.1)), TypeError, "p"),
    "dropout-seed-float": (lambda: fa.Dropout(0.1, seed=1.0), TypeError, "seed"),
    "dropout-seed-bool": (lambda: fa.Dropout(0.1, seed=True), TypeError, "seed"),
    "dropout-seed-string": (lambda: fa.Dropout(0.1, seed="7"), TypeError, "seed"),
    "dropout-seed-65-bits": (lambda: fa.Dropout(0.1, seed=2**64), ValueError, "seed"),
    "dropout-seed-int32-tensor": (lambda: fa.Dropout(0.1, seed=torch.tensor(7, dtype=torch.int32)), TypeError, "seed"),
    "dropout-seed-two": (lambda: fa.Dropout(0.1, seed=torch.tensor([7, 8])), ValueError, "seed"),
    "dropout-seed-array": (lambda: fa.Dropout(0.1, seed=np.array([7, 8])), TypeError, "seed"),
    "dropout-generator": (lambda: fa.Dropout(0.1, seed=torch.Generator()), TypeError, "seed"),
}

SOFTMAX = {
    "scores-list": (lambda: soften([[1.0]]), TypeError, "scores"),
    "scores-int": (lambda: soften(t(2, 3, dtype=torch.int64)), TypeError, "scores"),
    "scores-0d": (lambda: soften(torch.tensor(1.0)), ValueError, "scores"),
    "dim-too-large": (lambda: soften(dim=3), ValueError, "dim"),
    "dim-too-small": (lambda: soften(dim=-4), ValueError, "dim"),
    "dim-float": (lambda: soften(dim=1.0), TypeError, "dim"),
    "dim-none": (lambda: soften(dim=None), TypeError, "dim"),
    "dim-bool": (lambda: soften(dim=True), TypeError, "dim"),
    "dim-huge": (lambda: soften(dim=10**30), ValueError, "dim"),
    "dim-tuple": (lambda: soften(dim=(1, 2)), TypeError, "dim"),
    "mask-float": (lambda: soften(mask=t(3, 5)), TypeError, "mask"),
    "mask-list": (lambda: soften(mask=[1]), TypeError, "mask"),
    "mask-not-broadcastable": (lambda: soften(mask=t(4, 5, dtype=torch.bool)), ValueError, "mask"),
    "mask-too-many-dims": (lambda: soften(mask=t(1, 2, 3, 5, dtype=torch.bool)), ValueError, "mask"),
    "mask-other-device": (lambda: soften(mask=t(3, 5, dtype=torch.bool, device="meta")), ValueError, "mask"),
    "mask-requires-grad": (lambda: soften(mask=fa.ValidLengths(GROW)), ValueError, "mask"),
    "lens-wrong-batch": (lambda: soften(mask=fa.ValidLengths(t(3))), ValueError, "lens"),
    "bias-bool": (lambda: soften(bias=t(3, 5, dtype=torch.bool)), TypeError, "bias"),
    "bias-number": (lambda: soften(bias=1.0), TypeError, "bias"),
    "bias-not-broadcastable": (lambda: soften(bias=t(2, 2, 5)), ValueError, "bias"),
    "bias-other-device": (lambda: soften(bias=t(3, 5, device="meta")), ValueError, "bias"),
    "scale-none": (lambda: soften(scale=None), TypeError, "scale"),
    "scale-nan": (lambda: soften(scale=NAN), ValueError, "scale"),
    "scale-tensor": (lambda: soften(scale=torch.ones(1)), TypeError, "scale"),
    "mask-causal-bias": (lambda: soften(t(2, 5, 5), causal_lower_right(5, 5)), TypeError, "mask"),
    "bias-causal-bias": (lambda: soften(t(2, 5, 5), bias=causal_lower_right(5, 5)), TypeError, "bias"),
    "log-int": (lambda: soften(log=1), TypeError, "log"),
    "log-with-dropout": (lambda: soften(log=True, dropout=fa.Dropout(0.1)), ValueError, "log"),
    "dropout-number": (lambda: soften(dropout=0.1), TypeError, "dropout"),
    "empty-rows-unknown": (lambda: soften(empty_rows="nan"), ValueError, "empty_rows"),
    "empty-rows-none": (lambda: soften(empty_rows=None), ValueError, "empty_rows"),
    "empty-rows-array": (lambda: soften(empty_rows=np.array(["zero", "one"])), ValueError, "empty_rows"),
    "backend-unknown": (lambda: soften(backend="CUDA"), ValueError, "backend"),
    "causal-without-offset": (lambda: soften(mask=fa.Causal()), ValueError, "q_offset"),
    "offset-float": (lambda: soften(mask=fa.Causal(), q_offset=0.0), TypeError, "q_offset"),
}

# torch's classes: RuntimeErrors that are ValueErrors or TypeErrors too, but for what torch's argument parser refuses.
SDPA = {
    "query-none": (lambda: fa.scaled_dot_product_attention(None, t(2, 2), t(2, 2)), TypeError, "query"),
    "key-list": (lambda: sdpa(k=[1.0]), TypeError, "key"),
    "query-1d": (lambda: sdpa(q=t(8)), ArgumentError, "query"),
    "query-int": (lambda: sdpa(q=t(2, 4, 6, 8, dtype=torch.int64)), ArgumentTypeError, "query"),
    "value-sparse": (lambda: sdpa(v=t(2, 4, 6, 8).to_sparse()), ArgumentTypeError, "value"),
    "not-broadcastable": (lambda: sdpa(q=t(3, 4, 6, 8)), ArgumentError, "query"),
    "fewer-heads-without-gqa": (lambda: sdpa(k=t(2, 2, 6, 8), v=t(2, 2, 6, 8)), ArgumentError, "key"),
    "gqa-not-divisible": (lambda: sdpa(k=t(2, 3, 6, 8), v=t(2, 3, 6, 8), enable_gqa=True), ArgumentError, "heads"),
    "head-dims-differ": (lambda: sdpa(q=t(2, 4, 6, 9)), ArgumentError, "head_dim"),
    "mask-list": (lambda: sdpa(attn_mask=[[True]]), TypeError, "attn_mask"),
    "mask-int": (lambda: sdpa(attn_mask=t(6, 6, dtype=torch.int64)), ArgumentTypeError, "attn_mask"),
    "mask-not-broadcastable": (lambda: sdpa(attn_mask=t(5, 6)), ArgumentError, "attn_mask"),
    "mask-too-many-dims": (lambda: sdpa(attn_mask=t(1, 1, 1, 6, 6)), ArgumentError, "attn_mask"),
    "mask-other-device": (lambda: sdpa(attn_mask=t(6, 6, device="meta")), ArgumentError, "attn_mask"),
    "dropout-above-1": (lambda: sdpa(dropout_p=1.5), ArgumentError, "dropout_p"),
    "dropout-string": (lambda: sdpa(dropout_p="no"), TypeError, "dropout_p"),
    "causal-string": (lambda: sdpa(is_causal="yes"), TypeError, "is_causal"),
    "gqa-int": (lambda: sdpa(enable_gqa=1), TypeError, "enable_gqa"),
    "scale-1d-tensor": (lambda: sdpa(scale=torch.ones(1)), TypeError, "scale"),
    "scale-that-wants-a-gradient": (lambda: sdpa(scale=torch.tensor(1.0, requires_grad=True)), TypeError, "scale"),
    "scale-infinite": (lambda: sdpa(scale=INF), ArgumentError, "scale"),
    "dropout-none": (lambda: sdpa(dropout_p=None), TypeError, "dropout_p"),
    "dropout-nan": (lambda: sdpa(dropout_p=NAN), ArgumentError, "dropout_p"),
    "dropout-tensor-above-1": (lambda: sdpa(dropout_p=torch.tensor(1.5)), ArgumentError, "dropout_p"),
    "mixed-dtypes": (lambda: sdpa(q=t(2, 4, 6, 8, dtype=torch.float64)), ArgumentTypeError, "dtype"),
    "bias-of-other-lengths": (lambda: sdpa(attn_mask=causal_lower_right(5, 7)), ArgumentError, "CausalBias"),
    "bias-without-variant": (lambda: sdpa(attn_mask=causal_lower_right(6, 6)[0]), ArgumentError, "attn_mask"),
}


GROUPS = {"attention": ATTENTION, "mask": MASKS, "mod": MODS, "softmax": SOFTMAX, "sdpa": SDPA}


@pytest.mark.parametrize(
    ("call", "exception", "name"),
    [pytest.param(*case, id=f"{group}-{name}") for group, table in GROUPS.items() for name, case in table.items()],
)
def test_bad_input_is_explained(call, exception, name):
    with pytest.raises(exception) as caught:
        call()
    assert type(caught.value) is exception
    assert explains(caught.value, name), str(caught.value)


POSITIONAL = {
    "causal": {"mask": fa.Causal()},
    "window": {"mask": fa.SlidingWindow(2, 2)},
    "band": {"mask": fa.Band(3)},
    "documents": {"mask": fa.Documents(t(9, dtype=torch.int64))},
    "prefix": {"mask": fa.PrefixLM(2)},
    "and": {"mask": fa.KeyPadding(t(2, 9, dtype=torch.bool)) & fa.Causal()},
    "tensor-and": {"mask": t(6, 9, dtype=torch.bool) & fa.Causal()},
    "alibi": {"score_mods": (fa.ALiBi(t(4)),)},
    "decay": {"score_mods": (fa.SoftCap(2.0), fa.DecayBias(t(1, 4, 9)))},
}


@pytest.mark.parametrize("options", [pytest.param(o, id=name) for name, o in POSITIONAL.items()])
def test_missing_offset_names_both_usual_choices(options):
    with pytest.raises(ValueError, match="q_offset must be given") as caught:
        longer(**options)
    assert explains(caught.value, "q_offset")
    assert "q_offset=0 (top-left)" in str(caught.value)
    assert "q_offset=3 (bottom-right" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{}, {"mask": fa.ValidLengths(t(2) + 4)}, {"mask": t(6, 9, dtype=torch.bool)}, {"score_mods": (fa.SoftCap(2.0),)}],
    ids=["none", "lengths", "dense", "softcap"],
)
def test_offset_is_not_asked_for_where_nothing_compares_positions(options):
    assert longer(**options).shape == (2, 4, 6, 8)


@pytest.mark.parametrize(
    "offset", [3, np.int64(3), torch.tensor([3, 3]), torch.tensor([3, 3], dtype=torch.uint8)], ids=["int", "numpy", "int64", "uint8"]
)
def test_every_kind_of_int_is_an_offset(offset):
    assert longer(mask=fa.Causal(), q_offset=offset).equal(longer(mask=fa.Causal(), q_offset=3))


@pytest.mark.parametrize("scale", [1, np.float32(1.0), np.int64(1)], ids=["int", "float32", "int64"])
def test_every_kind_of_number_is_a_scale(scale):
    assert attend(scale=scale).equal(attend(scale=1.0))
    assert soften(scale=scale).equal(soften(scale=1.0))


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_lengths_of_every_dtype_reach_past_its_range(dtype):
    scores = t(1, 1, 4100)
    mask = fa.ValidLengths(torch.tensor([100], dtype=dtype))
    assert int((soften(scores, mask) > 0).sum()) == 100
    assert mask.lower(AttentionProblem.check(t(1, 1, 1, 8), t(1, 1, 4100, 8), t(1, 1, 4100, 8), OPTIONS).grid).kv_end.tolist() == [[100]]


def _fussy(problem):
    class Fussy:
        name = "fussy"

        def refusals(self, problem):
            return ["it is Tuesday", "q is too pink"]

        def reluctance(self, problem):
            return None

    return Fussy()


def test_explicit_backend_lists_every_reason():
    problem = AttentionProblem.check(*(t(1, 1, 6, 8),) * 3, OPTIONS)
    backends.register(_fussy(problem))
    try:
        with pytest.raises(fa.UnsupportedError) as caught:
            backends.resolve(problem, "fussy")
    finally:
        backends.unregister("fussy")
    assert explains(caught.value, "fussy")
    assert "it is Tuesday; q is too pink" in str(caught.value)


def test_attn_mask_with_is_causal_is_torchs_error():
    arguments = (*(t(4, 6, 8),) * 3, MASK)
    with pytest.raises(RuntimeError) as torchs:
        torch.nn.functional.scaled_dot_product_attention(*arguments, is_causal=True)
    with pytest.raises(RuntimeError) as ours:
        fa.scaled_dot_product_attention(*arguments, is_causal=True)
    assert type(ours.value) is type(torchs.value)
    assert str(ours.value).startswith(str(torchs.value))
    assert explains(ours.value, "attn_mask")


def test_eager_infers_shapes_on_meta():
    out = fa.attention(*(t(2, 4, 6, 8, device="meta"),) * 3, mask=fa.Causal(), backend="eager")
    assert out.is_meta and out.shape == (2, 4, 6, 8)


DOORS = {
    "d2l.DotProductAttention": lambda: d2l.DotProductAttention(backend="tpu"),
    "d2l.AdditiveAttention": lambda: d2l.AdditiveAttention(8, backend="tpu"),
    "d2l.MultiHeadAttention": lambda: d2l.MultiHeadAttention(8, 2, backend="tpu"),
    "MultiheadAttention": lambda: fused_attn.nn.MultiheadAttention(8, 2, backend="tpu"),
    "keras.Attention": lambda: keras.Attention(backend="tpu"),
    "keras.AdditiveAttention": lambda: keras.AdditiveAttention(backend="tpu"),
    "keras.MultiHeadAttention": lambda: keras.MultiHeadAttention(2, 4, backend="tpu"),
    "keras.GroupQueryAttention": lambda: keras.GroupQueryAttention(4, 2, 1, backend="tpu"),
    "x_transformers.Attend": lambda: x_transformers.Attend(backend="tpu"),
    "x_transformers.Attention": lambda: x_transformers.Attention(8, heads=2, dim_head=4, backend="tpu"),
    "x_transformers.Decoder": lambda: x_transformers.Decoder(dim=8, depth=1, heads=2, backend="tpu"),
    "flash_registry": lambda: flash_registry.register("tpu"),
}


@pytest.mark.parametrize("door", DOORS)
def test_unknown_backends_are_found_when_something_is_built(door):
    with pytest.raises(ValueError, match="backend must be 'auto' or one of") as error:
        DOORS[door]()
    assert explains(error.value, "backend")


@pytest.mark.quick
def test_a_device_without_an_index_is_any_of_its_type() -> None:
    """``Grid(shape, torch.device("cuda"))`` has tensors on cuda:0; fakes stand for them here."""
    with FakeTensorMode():
        tensor = torch.empty(2, device="cuda:1")
    require_device("x", tensor, torch.device("cuda"))
    for other in ("cuda:0", "cpu"):
        with pytest.raises(ValueError, match=f"on the inputs' device {other}; got cuda:1"):
            require_device("x", tensor, torch.device(other))
