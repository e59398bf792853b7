"""Tensors are made where the inputs are, whatever torch's default device is; what is kept for later calls as well. ``meta`` stands for a GPU."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fused_attn as fa
from fused_attn.backends.cpu import mask_tiles
from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.score_mods import ScoreMod
from fused_attn.testing import EVERYTHING, vocabulary

SHAPE = (2, 4, 33, 33)
GRID = Grid(SHAPE, torch.device("cpu"))
FEATURES: dict[str, dict[str, Any]] = {
    **{name: {"mask": mask} for name, mask in vocabulary(Mask, GRID).items()},
    **{name: {"score_mods": (mod,)} for name, mod in vocabulary(ScoreMod, GRID).items()},
    "seeded": {"dropout": fa.Dropout(0.5, seed=3)},
    "sinks": {"sinks": torch.zeros(4)},
    "offsets": {"mask": fa.Causal(), "q_offset": torch.tensor([0, 2])},
}


@contextmanager
def set_default(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.fixture(params=[torch.device, set_default], ids=["block", "default"])
def elsewhere(request: pytest.FixtureRequest) -> Callable[[], Any]:
    return lambda: request.param("meta")


def evaluated(options: dict[str, Any], backend: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v, dout = (torch.randn(2, 4, 33, 8, generator=generator, device="cpu") for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, aux = fa.attention(q, k, v, backend=backend, return_aux=EVERYTHING, **options)
    grads = torch.autograd.grad((out, aux.probs), (q, k, v), (dout, aux.probs.detach()))
    return [out, *(t for t in vars(aux).values() if isinstance(t, Tensor)), *grads]


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.device.type == "cpu"
        assert bool(((a == b) | (a.isnan() & b.isnan())).all())


@pytest.mark.quick
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("chosen", ["cpu", "eager"])
def test_attention_under_another_default_device(feature: str, chosen: str, elsewhere: Callable[[], Any]) -> None:
    want = evaluated(FEATURES[feature], chosen)
    with elsewhere():
        got = evaluated(FEATURES[feature], chosen)
    same(got, want)


@pytest.mark.quick
def test_kernels_under_another_default_device(kernel_backend: str) -> None:
    """Interpreted and simulated ones share the lowering above; these reach all they allocate themselves."""
    for feature in ("Dense0", "Bias0", "seeded", "sinks"):
        want = evaluated(FEATURES[feature], kernel_backend)
        with torch.device("meta"):
            got = evaluated(FEATURES[feature], kernel_backend)
        same(got, want)


@pytest.mark.quick
def test_softmax_under_another_default_device(backend: str, elsewhere: Callable[[], Any]) -> None:
    scores, bias = torch.randn(2, 3, 9, 9), torch.randn(9, 9)
    calls: list[dict[str, Any]] = [
        {},
        {"mask": fa.Causal(), "scale": 0.5},
        {"mask": fa.ValidLengths(torch.tensor([0, 4])), "empty_rows": "uniform"},
        {"log": True, "mask": fa.Band(3)},
        {"bias": bias, "dropout": fa.Dropout(0.3, seed=4)},
    ]
    for options in calls:
        leaf = scores.clone().requires_grad_()
        want = fa.masked_softmax(leaf, backend=backend, **options)
        grads = torch.autograd.grad(want.nan_to_num(0, 0, 0).sin().sum(), leaf)
        with elsewhere():
            got = fa.masked_softmax(leaf, backend=backend, **options)
            again = torch.autograd.grad(got.nan_to_num(0, 0, 0).sin().sum(), leaf)
        same([got, *again], [want, *grads])


@pytest.mark.quick
def test_what_is_kept_does_not_remember_the_default_device(elsewhere: Callable[[], Any]) -> None:
    mask_tiles._window_limit.cache_clear()
    with elsewhere():
        evaluated({"mask": fa.SlidingWindow(4, 1)}, "blocked")
    assert mask_tiles._window_limit.cache_info().currsize > 0
    same(evaluated({"mask": fa.SlidingWindow(4, 1)}, "blocked"), evaluated({"mask": fa.SlidingWindow(4, 1)}, "blocked"))


@pytest.mark.quick
def test_what_is_kept_in_inference_mode_serves_training() -> None:
    mask_tiles._window_limit.cache_clear()
    q = torch.randn(1, 2, 33, 8, requires_grad=True)
    with torch.inference_mode():
        fa.attention(q, q, q, mask=fa.SlidingWindow(4, 1), backend="blocked")
    torch.autograd.grad(fa.attention(q, q, q, mask=fa.SlidingWindow(4, 1), backend="blocked").sum(), q)


FIRST_USES = {
    "inference": "with torch.inference_mode(): fa.attention(q, q, q)",
    "fake": "with FakeTensorMode():\n    z = torch.randn(1, 2, 6, 8); fa.attention(z, z, z)",
    "export": "torch.export.export(Probs(), (q,))",
    "make_fx": "make_fx(Probs(), tracing_mode='fake')(q)",
}


@pytest.mark.parametrize("first", FIRST_USES)
def test_the_first_use_decides_nothing(first: str) -> None:
    """A backend is imported at first use; nothing that it keeps may belong to the mode which is in force then."""
    code = (
        "import torch, fused_attn as fa\n"
        "from torch._subclasses import FakeTensorMode\n"
        "from torch.fx.experimental.proxy_tensor import make_fx\n"
        "class Probs(torch.nn.Module):\n"
        "    def forward(self, x): return fa.attention(x, x, x, return_aux=fa.AuxRequest(probs=True), backend='cpu')[1].probs\n"
        "q = torch.randn(1, 2, 20, 8)\n"
        f"{FIRST_USES[first]}\n"
        "x = q.clone().requires_grad_()\n"
        "grad, = torch.autograd.grad(fa.attention(x, x, x, mask=fa.SlidingWindow(3, 0)).sum(), x)\n"
        "compiled = torch.compile(lambda t: fa.attention(t, t, t, mask=fa.SlidingWindow(3, 0)), backend='aot_eager', fullgraph=True)\n"
        "again, = torch.autograd.grad(compiled(x).sum(), x)\n"
        "probs = torch.export.export(Probs(), (q,)).module()(q)\n"
        "assert type(probs) is type(grad) is type(again) is torch.Tensor\n"
        "assert (again - grad).abs().max() <= 64 * torch.finfo(grad.dtype).eps and (probs.sum(-1) - 1).abs().max() <= 20 * torch.finfo(grad.dtype).eps\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fa.__file__).parents[1])


def test_importing_under_another_default_device() -> None:
    """Backends are imported at first use, which may be inside such a block."""
    code = (
        "import torch\n"
        "q = torch.ones(1, 1, 20, 8)\n"
        "with torch.device('meta'):\n"
        "    import fused_attn as fa\n"
        "    fa.attention(q, q, q, mask=fa.Causal())\n"
        "out = fa.attention(q, q, q, mask=fa.Causal() & fa.ValidLengths(torch.tensor([7])), backend='cpu')\n"
        "assert out.device.type == 'cpu' and out.eq(1).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(fa.__file__).parents[1])
