"""Who computes a case: fused_attn's backends and what a user would write today. A provider that cannot is refused with its reason."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn as fa
from benchmarks.cases import AttentionProblem, ScoreProblem, layers_of
from fused_attn_bench import Refusal
from fused_attn_bench.operation import operation

Forward = Callable[..., tuple[Tensor, ...]]
Maker = Callable[[Any], Forward]


def provider(name: str, *ops: str, default: Callable[[torch.device], bool] = lambda device: True) -> Callable[[Maker], Maker]:
    """Registers the decorated function, which takes a problem and returns its forward function, for the operations."""

    def register(maker: Maker) -> Maker:
        for op in ops:
            operation(op).add(name, maker, default)
        return maker

    return register


# On the CPU torch.compile and FlexAttention take longer to compile than to measure, and the others' packages run on GPUs.
peer = functools.partial(provider, default=lambda device: device.type == "cuda")


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal(f"the package {name.partition('.')[0]} is not installed ({error})") from None


def _requires(condition: bool, reason: str) -> None:
    if not condition:
        raise Refusal(reason)


def _fused(backend: str) -> Maker:
    def bind_attention(problem: AttentionProblem) -> Forward:
        variant = problem.variant
        request = fa.AuxRequest(probs=True) if variant.probs else None
        hand_on = fa.AuxRequest(scores=True, scores_dtype=torch.promote_types(getattr(torch, problem.case.dtype), torch.float32))
        attend = functools.partial(fa.attention, mask=problem.mask, q_offset=problem.q_offset, dropout=problem.dropout, backend=backend)
        capped = (fa.SoftCap(variant.cap),) if variant.cap else ()

        def forward(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            scoring, sinks = fa.Additive(*more) if variant.additive else None, more[0] if variant.sinks else None
            mods = (fa.Selective(),) if variant.selective else tuple(map(fa.Bias, more)) if variant.bias else capped
            returned = attend(q, k, v, scoring=scoring, score_mods=mods, sinks=sinks, return_aux=request)
            return (returned,) if isinstance(returned, Tensor) else (returned[0], returned[1].probs)

        def chained(*leaves: Tensor) -> tuple[Tensor, ...]:
            (*layers, last), _ = layers_of(problem, leaves)
            total, mods = 0.0, ()
            for layer in layers:
                out, aux = attend(*layer, score_mods=mods, return_aux=hand_on)
                total, mods = total + out, (fa.Bias(aux.scores),)
            return (total + attend(*last, score_mods=mods),)

        return chained if variant.layers > 1 else forward

    def bind_any(problem: ScoreProblem) -> Forward:
        if isinstance(problem, AttentionProblem):
            return bind_attention(problem)
        return lambda scores: (fa.masked_softmax(scores, problem.mask, q_offset=0, backend=backend),)

    return bind_any


provider("fused_attn", "attention", "softmax")(_fused("auto"))
for _backend in ("cuda", "triton", "cpu"):
    provider(
        f"fused_attn:{_backend}", "attention", "softmax", default=lambda device, name=_backend: device.type == "cuda" and name != "cpu"
    )(_fused(_backend))


@peer("compile", "attention", "softmax")
def _compile(problem: ScoreProblem) -> Forward:
    # One graph per case: a graph kept for all shapes would be slower than what a user of one shape gets.
    torch.compiler.reset()
    return torch.compile(problem.plain, dynamic=False)


def _sdpa(kernel: SDPBackend | None) -> Maker:
    def bind_attention(problem: AttentionProblem) -> Forward:
        _requires(not problem.variant.beyond_sdpa, problem.variant.beyond_sdpa)
        # torch's own word for causal has query 0 at key 0.
        causal = isinstance(problem.mask, fa.Causal) and problem.q_offset == 0
        keep = None if causal else problem.keep
        # torch's own function, also while fused_attn.integrations.sdpa is installed.
        attend = torch._C._nn.scaled_dot_product_attention

        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            grouped = q.shape[1] != k.shape[1]
            return (attend(q, k, v, attn_mask=bias[0] if bias else keep, is_causal=causal, enable_gqa=grouped),)

        if kernel is None:
            return forward

        def only(*leaves: Tensor) -> tuple[Tensor, ...]:
            with sdpa_kernel(kernel):
                try:
                    return forward(*leaves)
                except RuntimeError as error:
                    _requires(
                        "viable backend" not in str(error) and "available kernel" not in str(error),
                        "torch has no such kernel for this case",
                    )
                    raise

        return only

    return bind_attention


_KERNELS: Mapping[str, SDPBackend | None] = {
    "sdpa": None,
    "sdpa:flash": SDPBackend.FLASH_ATTENTION,
    "sdpa:efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa:cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa:math": SDPBackend.MATH,
}
for _name, _kernel in _KERNELS.items():
    (provider if _kernel is None else peer)(_name, "attention")(_sdpa(_kernel))


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@peer("flex", "attention")
def _flex(problem: AttentionProblem) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask

    _requires(not problem.variant.beyond_sdpa, problem.variant.beyond_sdpa)
    _requires(problem.device.type == "cuda" or problem.case.mode == "fwd", "has no backward on the CPU")
    keep, blocks = problem.keep, None
    if keep is not None:
        batch, heads, q_len, kv_len = keep.shape
        blocks = create_block_mask(lambda b, h, q, k: keep[b % batch, h % heads, q, k], batch, heads, q_len, kv_len, device=problem.device)

    def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        added = (lambda score, b, h, i, j: score + bias[0][0, h, i, j]) if bias else None
        return (_compiled_flex()(q, k, v, score_mod=added, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1]),)

    return forward


@peer("flash-attn", "attention")
def _flash_attn(problem: AttentionProblem) -> Forward:
    _requires(
        problem.case.variant in ("plain", "causal", "window"),
        "takes no dense mask or bias, no documents in this layout and returns no probabilities",
    )
    _requires(problem.device.type == "cuda" and problem.case.dtype in ("float16", "bfloat16"), "runs in 16 bits on a GPU")
    _requires(not problem.has("value_dim"), "takes values of the keys' size")
    attend = _package("flash_attn").flash_attn_func
    window = (255, 0) if problem.case.variant == "window" else (-1, -1)
    return lambda q, k, v: (
        attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=problem.mask is not None, window_size=window).transpose(1, 2),
    )


@peer("flash-attn-3", "attention")
def _flash_attn_3(problem: AttentionProblem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal"), "is measured without masks and causal")
    _requires(not problem.has("value_dim"), "is measured with values of the keys' size")
    _requires(problem.device.type == "cuda" and problem.case.dtype in ("float16", "bfloat16"), "runs in 16 bits on a GPU")
    attend, causal = _package("flash_attn_interface").flash_attn_func, problem.mask is not None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        # Earlier versions return the statistics as well.
        return ((out[0] if isinstance(out, tuple) else out).transpose(1, 2),)

    return forward


@peer("xformers", "attention")
def _xformers(problem: AttentionProblem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal", "bias"), "is measured without masks, causal and with a bias")
    _requires(not problem.has("kv_len", "kv_heads", "value_dim"), "is measured with as many keys as queries, and all heads apart")
    ops = _package("xformers.ops")
    causal = ops.LowerTriangularMask() if problem.case.variant == "causal" else None

    def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        added = bias[0].expand(q.shape[0], -1, -1, -1) if bias else causal
        return (ops.memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), added).transpose(1, 2),)

    return forward


@peer("x-transformers", "attention")
def _x_transformers(problem: AttentionProblem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal", "bias"), "is measured without masks, causal and with a bias")
    _requires(not problem.has("kv_len", "kv_heads", "value_dim"), "is measured with as many keys as queries, and all heads apart")
    attend = _package("x_transformers.attend").Attend(causal=problem.case.variant == "causal", flash=problem.case.variant != "bias")
    return lambda q, k, v, *bias: (attend(q, k, v, attn_bias=bias[0] if bias else None)[0],)


@peer("liger", "softmax")
def _liger(problem: ScoreProblem) -> Forward:
    _requires(problem.mask is None, "has no mask")
    _requires(problem.device.type == "cuda", "runs on a GPU")
    softmax = _package("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda scores: (softmax.apply(scores),)
