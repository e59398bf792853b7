"""Heatmaps of attention probabilities. Needs matplotlib (``pip install "fused-attn[viz]"``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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


def label_tokens(figure: Figure, keys: Sequence[str], queries: Sequence[str]) -> None:
    """Writes tokens along both axes of every panel of a figure made by ``show_heatmaps``."""
    for panel in (axes for axes in figure.axes if axes.images):
        panel.set_xticks(range(len(keys)), keys, rotation=90, fontsize=8)
        panel.set_yticks(range(len(queries)), queries, fontsize=8)
        panel.tick_params(length=0)
