"""Heatmaps of attention probabilities and pictures of masks. Needs matplotlib (``pip install "fused-attn[viz]"``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

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

    Example:
        >>> import torch
        >>> figure = show_heatmaps(torch.eye(4)[None, None], xlabel="Keys", ylabel="Queries")
        >>> len(figure.axes)
        2
    """
    from matplotlib import pyplot

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
    from matplotlib import pyplot

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


def label_tokens(figure: Figure, keys: Sequence[str], queries: Sequence[str]) -> None:
    """Writes tokens along both axes of every panel of a figure made by ``show_heatmaps``."""
    for panel in (axes for axes in figure.axes if axes.images):
        panel.set_xticks(range(len(keys)), keys, rotation=90, fontsize=8)
        panel.set_yticks(range(len(queries)), queries, fontsize=8)
        panel.tick_params(length=0)
