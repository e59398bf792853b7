"""Thumbnails of attention: torch's adaptive pooling of the whole matrix, without the matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_attn as fa
from fused_attn.masks import from_mask_mod
from fused_attn.normalizers import TopK
from fused_attn.viz import attention_thumbnail
from fused_attn_bench.measure import peak_bytes

BATCH, HEADS, LENGTH = 2, 4, 50
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": dict,
    "causal": lambda: {"mask": fa.Causal()},
    "a rule": lambda: {"mask": from_mask_mod(lambda b, h, q_idx, kv_idx: (q_idx + kv_idx) % 3 == 0)},
    "lengths of queries": lambda: {"mask": fa.ValidLengths(torch.randint(0, LENGTH, (BATCH, LENGTH))), "empty_rows": "uniform"},
    "dense": lambda: {"mask": fa.Dense(torch.rand(BATCH, 1, LENGTH, LENGTH) > 0.5)},
    "modifications": lambda: {"mask": fa.Causal(), "score_mods": (fa.ALiBi(torch.rand(HEADS)), fa.Bias(torch.randn(LENGTH, LENGTH)))},
    "sinks": lambda: {"sinks": torch.randn(HEADS), "scale": 0.7},
    "additive": lambda: {"scoring": fa.Additive(torch.randn(8))},
    "sigmoid": lambda: {"normalizer": fa.Sigmoid()},
    "top-k": lambda: {"normalizer": TopK(3)},
}


@pytest.mark.quick
@pytest.mark.parametrize("reduce", ["mean", "max"])
@pytest.mark.parametrize("name", CALLS)
def test_as_pooling_of_the_whole_matrix(name: str, reduce: Any) -> None:
    q, k = torch.randn(BATCH, HEADS, LENGTH, 8), torch.randn(BATCH, HEADS // 2, LENGTH, 8)
    options = CALLS[name]()
    _, aux = fa.attention(q, k, k, return_aux=fa.AuxRequest(probs=True), backend="eager", **options)
    pool = F.adaptive_avg_pool2d if reduce == "mean" else F.adaptive_max_pool2d
    for size in (7, 16, 256):
        side = min(size, LENGTH)
        torch.testing.assert_close(attention_thumbnail(q, k, size, reduce, **options), pool(aux.probs, (side, side)))


def test_a_cache_and_long_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fused_attn.viz._BLOCK", 3 * 2 * 90)
    q, k = torch.randn(1, 2, 33, 8, dtype=torch.float64, requires_grad=True), torch.randn(1, 2, 90, 8, dtype=torch.float64)
    options: dict[str, Any] = {"mask": fa.Causal(), "q_offset": 57}
    _, aux = fa.attention(q, k, k, return_aux=fa.AuxRequest(probs=True), backend="eager", **options)
    got = attention_thumbnail(q, k, 4, **options)
    assert got.dtype == torch.float64 and not got.requires_grad
    torch.testing.assert_close(got, F.adaptive_avg_pool2d(aux.probs.detach(), (4, 4)))


def test_half_precision_and_nothing_at_all() -> None:
    q = torch.randn(1, 2, 20, 8)
    got = attention_thumbnail(q.bfloat16(), q.bfloat16(), 5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, attention_thumbnail(q, q, 5), rtol=0, atol=0.02)
    assert attention_thumbnail(q[:, :, :0], q, 5).shape == (1, 2, 0, 5)
    assert attention_thumbnail(q, q[:, :, :0], 5).shape == (1, 2, 5, 0)


@pytest.mark.parametrize("name", ["causal", "modifications", "empty rows"])
def test_what_exists_at_a_time_is_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole matrix has 64 blocks of probabilities; up to eight arrays of a block are there on the way, and rows of them."""
    monkeypatch.setattr("fused_attn.viz._BLOCK", 1 << 16)
    q = torch.randn(1, 1, 2048, 4)
    options: dict[str, Any] = {
        "causal": {},
        "modifications": {"score_mods": (fa.SoftCap(3.0), fa.ALiBi(torch.rand(1)))},
        "empty rows": {"empty_rows": "softmax"},
    }[name]
    _, peak = peak_bytes(lambda: attention_thumbnail(q, q, 32, mask=fa.Causal(), **options), q.device)
    assert peak < 9 * (4 << 16)


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_mapped_over_a_bias(reduce: Any) -> None:
    q, biases = torch.randn(1, 2, 9, 4), torch.randn(3, 9, 9)
    mapped = torch.vmap(lambda b: attention_thumbnail(q, q, 4, reduce, score_mods=(fa.Bias(b),)))(biases)
    torch.testing.assert_close(mapped, torch.stack([attention_thumbnail(q, q, 4, reduce, score_mods=(fa.Bias(b),)) for b in biases]))


class Largest(TorchDispatchMode):
    """The most elements of any tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.quick
def test_no_tensor_of_the_matrix_size_is_made() -> None:
    q, length = torch.randn(1, 1, 2048, 4), 2048
    with Largest() as seen:
        attention_thumbnail(q, q, 32, mask=fa.Causal())
    assert 0 < seen.elements <= length * length // 16


def test_the_drawing() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install fused-attn[viz])")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from fused_attn.viz import show_attention

    q, k = torch.randn(2, 2, 3, 300, 8)[:, :, :2]
    figure = show_attention(q, k, size=32, mask=fa.Causal())
    *panels, _ = figure.axes
    pixels = attention_thumbnail(q, k, 32, mask=fa.Causal()).flatten(0, 1)
    for i, (panel, want) in enumerate(zip(panels, pixels, strict=True)):
        (image,) = panel.images
        assert panel.get_title() == f"head {i % 2}" and image.get_extent() == [0, 300, 300, 0]
        assert torch.as_tensor(image.get_array().data).equal(want)
        assert image.norm.vmax == pixels.max().item()  # one scale for all panels
    pyplot.close(figure)
    with pytest.raises(ValueError, match="must hold something to draw"):
        show_attention(q[:, :, :0], k)


def test_nan_is_drawn_as_missing() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install fused-attn[viz])")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from fused_attn.viz import show_attention

    q = torch.randn(1, 1, 6, 4)
    broken = q.clone()
    broken[0, 0, 2] = torch.nan
    figure = show_attention(broken, q)
    figure.canvas.draw()
    (image,) = figure.axes[0].images
    assert image.get_array().mask.any(1).tolist() == [False, False, True, False, False, False]
    want = attention_thumbnail(q, q)
    assert image.norm.vmax == pytest.approx(want[0, 0, [0, 1, 3, 4, 5]].max().item())
    show_attention(q * torch.nan, q).canvas.draw()
    pyplot.close("all")


MISTAKES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"reduce": "median"}, ValueError, "reduce must be 'mean' or 'max'"),
    ({"size": 0}, ValueError, "size must be >= 1"),
    ({"backend": "cpu", "dropout": None}, TypeError, r"got \['backend', 'dropout'\]"),
    ({"mask": fa.Causal(), "score_mods": (fa.Selective(),)}, ValueError, "got Selective"),
    ({"mask": "causal"}, TypeError, "mask must be a fused_attn mask"),
]


@pytest.mark.parametrize(("options", "kind", "message"), MISTAKES)
def test_mistakes_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    q = torch.randn(1, 1, 6, 4)
    with pytest.raises(kind, match=message):
        attention_thumbnail(q, q, **options)
