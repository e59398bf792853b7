"""Heatmaps of attention probabilities and pictures of masks. Needs matplotlib (``pip install "fused-attn[viz]"``)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.checks import described, require_integer
from fused_attn.lowering import stat_dtype
from fused_attn.picked import picked
from fused_attn.problem import AttentionProblem
from fused_attn.selective import is_selective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fused_attn.masks import Mask


def show_heatmaps(
    matrices: Tensor,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: str = "Reds",
) -> Figure:
    """One panel per matrix, each with a colour scale of its own, as ``d2l.show_heatmaps`` draws them.

    Args:
        matrices: [rows, columns, queries, keys], any device and dtype, with or without grad.
        xlabel: below the panels of the last row.
        ylabel: left of the panels of the first column.
        titles: one per column, repeated on every row.
        figsize: inches.
        cmap: name of a matplotlib colour map.

    Returns:
        The figure, for labels (``label_tokens``) or ``savefig``. The colour bar belongs to the last panel.

    Raises:
        ValueError: matrices are not 4-D, or there are fewer titles than columns.
        TypeError: matrices are complex.
        ImportError: matplotlib is missing.

    Example:
        >>> import torch
        >>> figure = show_heatmaps(torch.eye(4)[None, None], xlabel="Keys", ylabel="Queries")
        >>> len(figure.axes)
        2
    """
    pyplot = _pyplot()
    if matrices.is_complex():
        raise TypeError(f"matrices must be real; got {described(matrices)}. Draw .abs() of them.")
    if matrices.dim() != 4:
        raise ValueError(
            f"matrices must be 4-D [rows, columns, queries, keys]; got {matrices.dim()}-D {list(matrices.shape)}. "
            "Insert dimensions with [None]."
        )
    rows, columns = matrices.shape[:2]
    if titles is not None and len(titles) < columns:
        raise ValueError(f"titles must have one entry per column; got {len(titles)} for {columns} columns. Repeat or add titles.")
    figure, axes = pyplot.subplots(rows, columns, figsize=figsize, sharex=True, sharey=True, squeeze=False)
    for i, row in enumerate(matrices.detach().cpu().float()):
        for j, matrix in enumerate(row):
            image = axes[i, j].imshow(matrix.numpy(), cmap=cmap)
            if i == rows - 1:
                axes[i, j].set_xlabel(xlabel)
            if j == 0:
                axes[i, j].set_ylabel(ylabel)
            if titles is not None:
                axes[i, j].set_title(titles[j])
    figure.colorbar(image, ax=axes, shrink=0.6)
    return figure


def show_masks(masks: Mapping[str, Mask], q_len: int = 16, kv_len: int = 16) -> Figure:
    """One panel per mask, dark where a query (downwards) may attend to a key, of batch 0 and head 0; keys begin with query 0's position.

    Args:
        masks: by what to write above each.
        q_len: queries.
        kv_len: keys.

    Example:
        >>> from fused_attn import Causal, Chunked
        >>> figure = show_masks({"causal": Causal(), "~causal | chunked": ~Causal() | Chunked(4)})
        >>> [panel.get_title() for panel in figure.axes]
        ['causal', '~causal | chunked']
    """
    pyplot = _pyplot()
    if not masks:
        raise ValueError("masks must hold at least one mask; got none. Pass {'causal': Causal()}.")
    figure, axes = pyplot.subplots(1, len(masks), figsize=(2.6 * len(masks), 2.8), sharex=True, sharey=True, squeeze=False)
    for panel, (title, mask) in zip(axes[0], masks.items(), strict=True):
        rows = [[mark == "#" for mark in line] for line in mask.picture(q_len, kv_len).splitlines()]
        panel.imshow(rows, cmap="Greys", vmin=-0.4, vmax=1.2)
        panel.set_xticks([k - 0.5 for k in range(1, kv_len)], [""] * (kv_len - 1))
        panel.set_yticks([q - 0.5 for q in range(1, q_len)], [""] * (q_len - 1))
        panel.grid(color="white", linewidth=0.6)
        panel.tick_params(length=0)
        panel.set_title(title, fontsize=8)
    axes[0, 0].set_ylabel("Queries")
    axes[0, 0].set_xlabel("Keys")
    return figure


# Probabilities that a thumbnail makes at a time. Up to eight arrays of their size are there on the way: 16 MB of float32.
_BLOCK = 1 << 19
_DEFAULTS: dict[str, Any] = {
    "mask": None,
    "scale": None,
    "scoring": None,
    "q_offset": None,
    "score_mods": (),
    "sinks": None,
    "normalizer": None,
    "empty_rows": "zero",
}


def attention_thumbnail(q: Tensor, k: Tensor, size: int = 256, reduce: Literal["mean", "max"] = "mean", **options: Any) -> Tensor:
    """The probabilities of a sequence of any length, shrunk to at most ``size`` queries and keys; some rows are there at a time.

    What ``adaptive_avg_pool2d`` (or ``adaptive_max_pool2d``) makes of the whole matrix, in O(length + size^2) memory.

    Args:
        q: queries [batch, heads, q_len, head_dim].
        k: keys [batch, kv_heads, kv_len, head_dim].
        size: pixels along each side; a shorter side keeps its length.
        reduce: "mean" or "max" of the probabilities below a pixel. A mean shows where the mass lies, a maximum single strong links.
        **options: ``mask``, ``scale``, ``scoring``, ``q_offset``, ``score_mods``, ``sinks``, ``normalizer`` and ``empty_rows`` of ``attention``.

    Returns:
        [batch, heads, min(size, q_len), min(size, kv_len)], float32 (float64 for float64), without gradient.

    Raises:
        ValueError, TypeError: the arguments contradict each other, as in ``attention``; the message says what to do.

    Example:
        >>> from fused_attn import Causal
        >>> q, k = torch.randn(2, 1, 4, 1000, 16)
        >>> thumbnail = attention_thumbnail(q, k, size=50, mask=Causal())
        >>> thumbnail.shape, thumbnail[0, 0, 10, 11:].any().item()
        (torch.Size([1, 4, 50, 50]), False)
    """
    if reduce not in ("mean", "max"):
        raise ValueError(f"reduce must be 'mean' or 'max'; got {described(reduce)}. 'mean' is the default.")
    unknown = sorted(options.keys() - _DEFAULTS.keys())
    if unknown:
        raise TypeError(f"options must be arguments of attention that make probabilities; got {unknown}. Leave them out.")
    size = require_integer("size", size, 1)
    with torch.no_grad():
        problem = AttentionProblem.check(q, k, k[..., :1], {**_DEFAULTS, **options, "dropout": None, "return_aux": None})
        if is_selective(problem.modifiers.score_mods):
            raise ValueError(
                "score_mods must leave a row's scores to that row for a thumbnail; got Selective, which needs all earlier queries. "
                "Take probs of attention, and show_heatmaps."
            )
        batch, heads, q_len, kv_len = problem.shape
        height, width = min(size, q_len), min(size, kv_len)
        if not height * width * batch * heads:
            return q.new_zeros((batch, heads, height, width), dtype=stat_dtype(q.dtype))
        pool = F.adaptive_avg_pool1d if reduce == "mean" else F.adaptive_max_pool1d
        # The bins of torch's adaptive pooling.
        bins = (range(i * q_len // height, -(-(i + 1) * q_len // height)) for i in range(height))
        return torch.stack([pool(_row_of_keys(problem, rows, reduce), width) for rows in bins], 2)


def _row_of_keys(problem: AttentionProblem, rows: range, reduce: str) -> Tensor:
    """Mean or maximum over some queries of their probabilities, [batch, heads, kv_len]."""
    batch, heads, _, kv_len = problem.shape
    found: Tensor | None = None
    for block in torch.arange(rows.start, rows.stop, device=problem.device).split(max(1, _BLOCK // (batch * heads * kv_len))):
        probs = picked(problem, AuxRequest(probs=True, rows=block)).probs
        assert probs is not None
        probs = probs.to(stat_dtype(probs.dtype))
        part = probs.sum(2) if reduce == "mean" else probs.amax(2)
        found = part if found is None else found + part if reduce == "mean" else found.maximum(part)
    assert found is not None
    return found / len(rows) if reduce == "mean" else found


def show_attention(q: Tensor, k: Tensor, size: int = 256, reduce: Literal["mean", "max"] = "mean", **options: Any) -> Figure:
    """One panel per batch element (downwards) and head of ``attention_thumbnail``, the axes in queries and keys, one logarithmic scale for all.

    Returns:
        The figure. Colours span four powers of ten below the largest probability; what is smaller looks like 0. NaN is grey.

    Example:
        >>> q, k = torch.randn(2, 1, 2, 300, 16)
        >>> figure = show_attention(q, k, size=64)
        >>> [panel.get_title() for panel in figure.axes[:2]]
        ['head 0', 'head 1']
    """
    pyplot = _pyplot()
    from matplotlib import colormaps, colors

    pixels = attention_thumbnail(q, k, size, reduce, **options).cpu()
    if not pixels.numel():
        raise ValueError(f"q and k must hold something to draw; got {list(q.shape)} and {list(k.shape)}. Pass at least one query and key.")
    batch, heads = pixels.shape[:2]
    figsize = (1.2 + 2.4 * heads, 0.4 + 2.4 * batch)
    figure, axes = pyplot.subplots(batch, heads, figsize=figsize, sharex=True, sharey=True, squeeze=False, layout="constrained")
    largest = pixels.nan_to_num(0.0).max().item() or 1.0
    cmap = colormaps["Reds"].with_extremes(bad="grey")
    norm = colors.LogNorm(1e-4 * largest, largest, clip=True)
    for b, h in itertools.product(range(batch), range(heads)):
        image = axes[b, h].imshow(pixels[b, h].numpy(), cmap=cmap, norm=norm, extent=(0, k.shape[2], q.shape[2], 0), aspect="auto")
        axes[b, h].set_title(f"head {h}")
        axes[b, 0].set_ylabel("Queries")
        axes[-1, h].set_xlabel("Keys")
    figure.colorbar(image, ax=axes, shrink=0.8)
    return figure


def label_tokens(figure: Figure, keys: Sequence[str], queries: Sequence[str]) -> None:
    """Writes tokens along both axes of every panel of a figure made by ``show_heatmaps``.

    Raises:
        ValueError: not one token for each row and column of the panels.

    Example:
        >>> label_tokens(show_heatmaps(torch.eye(2)[None, None], "Keys", "Queries"), keys=["it", "is"], queries=["it", "is"])
    """
    panels = [axes for axes in figure.axes if axes.images]
    for name, tokens, dim in (("keys", keys, 1), ("queries", queries, 0)):
        for size in (panel.images[0].get_size()[dim] for panel in panels):
            if len(tokens) != size:
                raise ValueError(
                    f"{name} must have one token for each of the {size} {name} drawn; got {len(tokens)}. Slice or extend them."
                )
    for panel in panels:
        panel.set_xticks(range(len(keys)), keys, rotation=90, fontsize=8)
        panel.set_yticks(range(len(queries)), queries, fontsize=8)
        panel.tick_params(length=0)


def _pyplot() -> Any:
    """matplotlib's pyplot.

    Raises:
        ImportError: it is missing; the message says how to install it.
    """
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError('drawing needs matplotlib; got none installed. Run: pip install "fused-attn[viz]"', name="matplotlib") from error
    return pyplot
