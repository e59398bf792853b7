"""Heatmaps, as structure: the panels, labels and scales that ``d2l.show_heatmaps`` gives."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install fused-attn[viz])")
pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield
    pyplot.close("all")


def test_one_panel(device: torch.device) -> None:
    from fused_attn.viz import show_heatmaps

    matrices = torch.rand(1, 1, 2, 10, device=device, dtype=torch.bfloat16).requires_grad_()
    panel, scale = show_heatmaps(matrices, xlabel="Keys", ylabel="Queries").axes
    assert (panel.get_xlabel(), panel.get_ylabel(), panel.get_title()) == ("Keys", "Queries", "")
    (image,) = panel.images
    assert image.get_cmap().name == "Reds" and image.get_array().shape == (2, 10)
    assert image.get_clim() == pytest.approx((matrices.min().item(), matrices.max().item()))
    assert not scale.images


def test_labels_stand_at_the_border_and_titles_on_every_row() -> None:
    from fused_attn.viz import show_heatmaps

    matrices = torch.rand(2, 3, 4, 5)
    figure = show_heatmaps(matrices, "Keys", "Queries", titles=["a", "b", "c"], figsize=(7, 4), cmap="viridis")
    *panels, _ = figure.axes
    assert [p.get_title() for p in panels] == ["a", "b", "c"] * 2
    assert [p.get_xlabel() for p in panels] == [""] * 3 + ["Keys"] * 3
    assert [p.get_ylabel() for p in panels] == ["Queries", "", ""] * 2
    assert figure.get_size_inches().tolist() == [7, 4]
    for panel, matrix in zip(panels, matrices.flatten(0, 1), strict=True):
        assert torch.equal(torch.as_tensor(panel.images[0].get_array().data), matrix)


def test_tokens_label_both_axes() -> None:
    from fused_attn.viz import label_tokens, show_heatmaps

    figure = show_heatmaps(torch.rand(1, 2, 2, 3), "Keys", "Queries")
    label_tokens(figure, keys=["x", "y", "z"], queries=["p", "q"])
    for panel in figure.axes[:2]:
        assert [t.get_text() for t in panel.get_xticklabels()] == ["x", "y", "z"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["p", "q"]


def test_masks_are_drawn_as_their_pictures() -> None:
    import fused_attn as fa
    from fused_attn.viz import show_masks

    masks = {"images": fa.Causal() | fa.BidirectionalBlocks(torch.tensor([-1, 0, 0, 0, -1])), "block-causal": fa.BlockCausal(2)}
    figure = show_masks(masks, 5, 5)
    for panel, (title, mask) in zip(figure.axes, masks.items(), strict=True):
        assert panel.get_title() == title
        drawn = torch.as_tensor(panel.images[0].get_array().data)
        assert "\n".join("".join("#" if x else "." for x in row) for row in drawn.tolist()) == mask.picture(5, 5)
    with pytest.raises(ValueError, match="at least one mask"):
        show_masks({})


@pytest.mark.parametrize(
    ("shape", "titles", "message"),
    [((2, 3), None, "matrices must be 4-D"), ((1, 2, 3, 3), ["a"], "titles must have one entry per column")],
)
def test_mistakes_are_named(shape: tuple[int, ...], titles: list[str] | None, message: str) -> None:
    from fused_attn.viz import show_heatmaps

    with pytest.raises(ValueError, match=message):
        show_heatmaps(torch.zeros(shape), "Keys", "Queries", titles)


@pytest.mark.parametrize(("keys", "queries", "name"), [(["x"], ["p", "q"], "keys"), (["x", "y", "z"], ["p", "q", "r"], "queries")])
def test_tokens_must_be_as_many_as_are_drawn(keys: list[str], queries: list[str], name: str) -> None:
    from fused_attn.viz import label_tokens, show_heatmaps

    figure = show_heatmaps(torch.rand(1, 1, 2, 3), "Keys", "Queries")
    before = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    with pytest.raises(ValueError, match=f"{name} must have one token for each of the . {name} drawn"):
        label_tokens(figure, keys, queries)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == before


def test_complex_matrices_are_refused() -> None:
    from fused_attn.viz import show_heatmaps

    with pytest.raises(TypeError, match="matrices must be real"):
        show_heatmaps(torch.zeros(1, 1, 2, 2, dtype=torch.complex64), "Keys", "Queries")


def test_without_matplotlib_one_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import fused_attn as fa
    from fused_attn.viz import show_attention, show_heatmaps, show_masks

    q = torch.ones(1, 1, 2, 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    for draw in (lambda: show_heatmaps(q, "Keys", "Queries"), lambda: show_masks({"causal": fa.Causal()}), lambda: show_attention(q, q)):
        with pytest.raises(ImportError, match=r'pip install "fused-attn\[viz\]"'):
            draw()


class Missing:
    """Finds no matplotlib."""

    def find_spec(self, name: str, *_: object) -> None:
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
