"""Who computes a case: fused_attn's backends and what a user would write today. A provider that cannot is refused with its reason."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused_attn as fa
from benchmarks.cases import Problem, Results, layers_of, plain

Forward = Callable[..., tuple[Tensor, ...]]


class Refusal(Exception):
    """Why a provider cannot compute a case."""


Maker = Callable[[Problem], Forward]
# Operation -> provider -> what binds it to a problem. Add to it to measure a function of your own (see docs/benchmarking.md).
PROVIDERS: dict[str, dict[str, Maker]] = {"attention": {}, "softmax": {}}


def provider(name: str, *ops: str) -> Callable[[Maker], Maker]:
    """Registers the decorated function, which takes a problem and returns its forward function, for the operations."""

    def register(maker: Maker) -> Maker:
        for op in ops:
            PROVIDERS[op][name] = maker
        return maker

    return register


def load(path: Path) -> None:
    """Runs a Python file that adds providers.

    Raises:
        ValueError: there is no such file.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ValueError(f"providers are added by Python files; got {path}")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def names() -> list[str]:
    """Every provider once."""
    return list(dict.fromkeys(name for makers in PROVIDERS.values() for name in makers))


def split(name: str) -> tuple[str, float]:
    """A provider's name and its planted slowdown.

    Example:
        >>> split("eager+5%"), split("sdpa:flash")
        (('eager', 0.05), ('sdpa:flash', 0.0))
    """
    found = re.fullmatch(r"(.+)\+(\d+(?:\.\d+)?)%", name)
    return (found[1], float(found[2]) / 100) if found else (name, 0.0)


def known(name: str) -> str:
    """The name itself.

    Raises:
        ValueError: there is no such provider.
    """
    if split(name)[0] not in names():
        raise ValueError(f"a provider must be one of {', '.join(names())}, or one of them made slower like eager+5%; got {name!r}")
    return name


def bind(name: str, problem: Problem) -> Callable[[], Results]:
    """What is timed: the provider on the problem. "eager+5%" is eager made 5 % slower, to see whether that is noticed.

    Raises:
        Refusal: it cannot compute the case, and why.
    """
    base, slowdown = split(known(name))
    if slowdown and problem.device.type == "cuda":
        raise Refusal("a planted slowdown waits on the host, which a GPU would not notice")
    if base not in PROVIDERS[problem.case.op]:
        raise Refusal(f"has no {problem.case.op}")
    call = problem.caller(PROVIDERS[problem.case.op][base](problem))
    return _slowed(call, slowdown) if slowdown else call


def defaults(device: torch.device) -> list[str]:
    """What a plain ``run`` compares: on the CPU torch.compile and FlexAttention take longer to compile than to measure."""
    on_gpu = [n for n in names() if n != "fused_attn:cpu"]
    return on_gpu if device.type == "cuda" else ["fused_attn", "eager", "sdpa"]


def _slowed(call: Callable[[], Results], fraction: float) -> Callable[[], Results]:
    def slow() -> Results:
        start = time.perf_counter()
        result = call()
        end = time.perf_counter()
        until = end + fraction * (end - start)
        while time.perf_counter() < until:
            pass
        return result

    return slow


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Refusal(f"the package {name.partition('.')[0]} is not installed ({error})") from None


def _requires(condition: bool, reason: str) -> None:
    if not condition:
        raise Refusal(reason)


@contextmanager
def observed() -> Iterator[list[str]]:
    """What fused_attn runs inside, noted where every call passes: the backend, and each stage's tile configuration in Triton."""
    from fused_attn import backends
    from fused_attn.backends.triton import config

    found: list[str] = []
    resolve, lookup = backends.resolve, config.lookup

    def resolving(problem: Any, backend: str) -> str:
        found.append(resolve(problem, backend))
        return found[-1]

    def looking(chip: int, which: config.Pass, dtype: torch.dtype, head_size: int) -> config.TileConfig:
        tile = lookup(chip, which, dtype, head_size)
        found.append(f"{which.stage}={'x'.join(map(str, tile))}")
        return tile

    backends.resolve, config.lookup = resolving, looking
    try:
        yield found
    finally:
        backends.resolve, config.lookup = resolve, lookup


def _fused(backend: str) -> Maker:
    def bind_attention(problem: Problem) -> Forward:
        variant = problem.variant
        request = fa.AuxRequest(probs=True) if variant.probs else None
        hand_on = fa.AuxRequest(scores=True, scores_dtype=torch.promote_types(getattr(torch, problem.case.dtype), torch.float32))
        attend = functools.partial(fa.attention, mask=problem.mask, backend=backend)

        def forward(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, ...]:
            scoring = fa.Additive(*more) if variant.additive else None
            mods = (fa.Selective(),) if variant.selective else tuple(map(fa.Bias, more)) if variant.bias else ()
            returned = attend(q, k, v, scoring=scoring, score_mods=mods, return_aux=request)
            return (returned,) if isinstance(returned, Tensor) else (returned[0], returned[1].probs)

        def chained(*leaves: Tensor) -> tuple[Tensor, ...]:
            (*layers, last), _ = layers_of(problem, leaves)
            total, mods = 0.0, ()
            for layer in layers:
                out, aux = attend(*layer, score_mods=mods, return_aux=hand_on)
                total, mods = total + out, (fa.Bias(aux.scores),)
            return (total + attend(*last, score_mods=mods),)

        return chained if variant.layers > 1 else forward

    def bind_any(problem: Problem) -> Forward:
        if problem.case.op == "attention":
            return bind_attention(problem)
        return lambda scores: (fa.masked_softmax(scores, problem.mask, q_offset=0, backend=backend),)

    return bind_any


for _backend in ("auto", "cuda", "triton", "cpu"):
    provider("fused_attn" if _backend == "auto" else f"fused_attn:{_backend}", "attention", "softmax")(_fused(_backend))


@provider("eager", "attention", "softmax")
def _eager(problem: Problem) -> Forward:
    return lambda *leaves: plain(problem, problem.keep, *leaves)


@provider("compile", "attention", "softmax")
def _compile(problem: Problem) -> Forward:
    # One graph per case: a graph kept for all shapes would be slower than what a user of one shape gets.
    torch.compiler.reset()
    return torch.compile(_eager(problem), dynamic=False)


def _sdpa(kernel: SDPBackend | None) -> Maker:
    def bind_attention(problem: Problem) -> Forward:
        _requires(not problem.variant.beyond_sdpa, problem.variant.beyond_sdpa)
        causal = isinstance(problem.mask, fa.Causal)
        keep = None if causal else problem.keep
        # torch's own function, also while fused_attn.integrations.sdpa is installed.
        attend = torch._C._nn.scaled_dot_product_attention

        def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
            return (attend(q, k, v, attn_mask=bias[0] if bias else keep, is_causal=causal),)

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
    provider(_name, "attention")(_sdpa(_kernel))


@functools.cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@provider("flex", "attention")
def _flex(problem: Problem) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask

    _requires(not problem.variant.beyond_sdpa, problem.variant.beyond_sdpa)
    _requires(problem.device.type == "cuda" or problem.case.mode == "fwd", "has no backward on the CPU")
    keep, blocks = problem.keep, None
    if keep is not None:
        batch, heads, q_len, kv_len = keep.shape
        blocks = create_block_mask(lambda b, h, q, k: keep[b % batch, h % heads, q, k], batch, heads, q_len, kv_len, device=problem.device)

    def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        added = (lambda score, b, h, i, j: score + bias[0][0, h, i, j]) if bias else None
        return (_compiled_flex()(q, k, v, score_mod=added, block_mask=blocks),)

    return forward


@provider("flash-attn", "attention")
def _flash_attn(problem: Problem) -> Forward:
    _requires(
        problem.case.variant in ("plain", "causal", "window"),
        "takes no dense mask or bias, no documents in this layout and returns no probabilities",
    )
    _requires(problem.device.type == "cuda" and problem.case.dtype in ("float16", "bfloat16"), "runs in 16 bits on a GPU")
    attend = _package("flash_attn").flash_attn_func
    window = (255, 0) if problem.case.variant == "window" else (-1, -1)
    return lambda q, k, v: (
        attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=problem.mask is not None, window_size=window).transpose(1, 2),
    )


@provider("flash-attn-3", "attention")
def _flash_attn_3(problem: Problem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal"), "is measured without masks and causal")
    _requires(problem.device.type == "cuda" and problem.case.dtype in ("float16", "bfloat16"), "runs in 16 bits on a GPU")
    attend, causal = _package("flash_attn_interface").flash_attn_func, problem.mask is not None

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        out = attend(*(t.transpose(1, 2) for t in (q, k, v)), causal=causal)
        # Earlier versions return the statistics as well.
        return ((out[0] if isinstance(out, tuple) else out).transpose(1, 2),)

    return forward


@provider("xformers", "attention")
def _xformers(problem: Problem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal", "bias"), "is measured without masks, causal and with a bias")
    ops = _package("xformers.ops")
    causal = ops.LowerTriangularMask() if problem.case.variant == "causal" else None

    def forward(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor) -> tuple[Tensor, ...]:
        added = bias[0].expand(q.shape[0], -1, -1, -1) if bias else causal
        return (ops.memory_efficient_attention(*(t.transpose(1, 2) for t in (q, k, v)), added).transpose(1, 2),)

    return forward


@provider("x-transformers", "attention")
def _x_transformers(problem: Problem) -> Forward:
    _requires(problem.case.variant in ("plain", "causal", "bias"), "is measured without masks, causal and with a bias")
    attend = _package("x_transformers.attend").Attend(causal=problem.case.variant == "causal", flash=problem.case.variant != "bias")
    return lambda q, k, v, *bias: (attend(q, k, v, attn_bias=bias[0] if bias else None)[0],)


@provider("liger", "softmax")
def _liger(problem: Problem) -> Forward:
    _requires(problem.mask is None, "has no mask")
    _requires(problem.device.type == "cuda", "runs on a GPU")
    softmax = _package("liger_kernel.ops.softmax").LigerSoftmaxFunction
    return lambda scores: (softmax.apply(scores),)
