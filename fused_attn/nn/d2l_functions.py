"""The functions of "Dive into Deep Learning" around attention: masks from valid lengths, and heads folded into the batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_attn import functional, viz
from fused_attn.checks import described
from fused_attn.masks import ValidLengths

# What masked scores become before the softmax; float16 cannot hold it.
FILL = -1e6


def masked_softmax(X: Tensor, valid_lens: Tensor | None, *, backend: str = "auto") -> Tensor:
    """Softmax over the first keys of each row, where masked scores count as -1e6 (Zhang et al., Dive into Deep Learning, 11.3).

    The fill is finite: a row without keys gives 1/keys everywhere, and a valid score far below -1e6 loses to masked keys. X is left as it is,
    where d2l writes into it. In float16, where d2l's fill is an infinity and its rows without keys are NaN, they give 1/keys as well.
    Under autocast narrow scores give float32, as torch's softmax does.

    Args:
        X: scores [batch, ..., queries, keys], of any rank; with lengths [batch], [batch, queries, keys].
        valid_lens: int or float [batch], or one for each row in any shape, e.g. [batch, queries]; 1.5 keeps two keys, <= 0 none. None
            keeps all.
        backend: handed to ``fused_attn.masked_softmax``.

    Raises:
        IndexError: the lengths are not one per sequence or row.

    Example:
        >>> masked_softmax(torch.zeros(2, 1, 4), torch.tensor([2, 0]))
        tensor([[[0.5000, 0.5000, 0.0000, 0.0000]],
        <BLANKLINE>
                [[0.2500, 0.2500, 0.2500, 0.2500]]])
    """
    X = X.float() if X.dtype.itemsize < 4 and not X.is_meta and torch.is_autocast_enabled(X.device.type) else X
    if valid_lens is None:
        return functional.masked_softmax(X, backend=backend)
    rows = X.shape[:-1]
    per_row = valid_lens.repeat_interleave(X.shape[1]) if valid_lens.dim() == 1 else valid_lens.reshape(-1)
    if per_row.numel() != rows.numel():
        raise _misfit(valid_lens, f"X {list(X.shape)}")
    keep = torch.arange(X.shape[-1], device=X.device) < per_row.reshape(*rows, 1)
    if X.dtype == torch.float16:
        return functional.masked_softmax(X, keep, empty_rows="uniform", backend=backend)
    return functional.masked_softmax(X.masked_fill(~keep, FILL), backend=backend)


def _misfit(valid_lens: Tensor, what: str) -> IndexError:
    return IndexError(
        f"valid_lens must hold one length for each sequence, [batch], or one for each row, for {what}; got {list(valid_lens.shape)}. Repeat or reshape it."
    )


def lengths_mask(valid_lens: Tensor | None, batch: int, q_len: int) -> ValidLengths | None:
    """Lengths as ``masked_softmax`` takes them for scores [batch, q_len, keys].

    Raises:
        IndexError: they are neither [batch] nor one for each row.
    """
    if valid_lens is None:
        return None
    if valid_lens.numel() != (batch if valid_lens.dim() == 1 else batch * q_len):
        raise _misfit(valid_lens, f"{batch} sequences of {q_len} queries")
    lens = valid_lens.detach()
    if lens.is_floating_point():  # no key is below NaN
        lens = lens.masked_fill(lens.isnan(), 0.0)
    lens = lens.to(torch.uint8) if lens.dtype == torch.bool else lens
    return ValidLengths(lens if lens.dim() == 1 else lens.reshape(batch, q_len))


def sequence_mask(X: Tensor, valid_len: Tensor, value: float | Tensor = 0) -> Tensor:
    """X with ``value`` where dimension 1 is not below the length; X is left as it is, where d2l writes into it.

    Args:
        X: [batch, steps, ...].
        valid_len: int or float [batch].
        value: what the others become, in X's dtype: a number, or a tensor, with gradient, of any shape that ``X[hidden] = value`` takes.

    Raises:
        IndexError: not one length for each of X's first dimension.
        RuntimeError: X's dtype cannot hold the value.

    Example:
        >>> sequence_mask(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([1, 2]))
        tensor([[1, 0, 0],
                [4, 5, 0]])
    """
    if X.dim() < 2 or list(valid_len.shape) != [X.shape[0]]:
        raise IndexError(
            f"valid_len must be [batch] for X [batch, steps, ...]; got {list(valid_len.shape)} for {list(X.shape)}. Give one length per sequence."
        )
    hidden = ~(torch.arange(X.shape[1], device=X.device) < valid_len[:, None])
    try:
        if isinstance(value, Tensor) and value.dim():
            filled = X.clone()
            filled[hidden] = value
            return filled
        if not isinstance(value, Tensor):
            value = torch.full((), value, dtype=X.dtype, device=X.device)
        elif X.is_floating_point():
            value = value.to(X.dtype)
        return X.masked_fill(hidden.view(*hidden.shape, *(1,) * (X.dim() - 2)), value)
    except RuntimeError as error:
        raise RuntimeError(
            f"value must be what {X.dtype} holds, one number or a tensor that fits the hidden part of X {list(X.shape)}; got "
            f"{described(value)}. Convert X or the value."
        ) from error


def transpose_qkv(X: Tensor, num_heads: int) -> Tensor:
    """[batch, steps, heads * size] as [batch * heads, steps, size], the head fastest.

    Raises:
        RuntimeError: the heads do not divide the features.

    Example:
        >>> transpose_qkv(torch.arange(4).view(1, 1, 4), 2)
        tensor([[[0, 1]],
        <BLANKLINE>
                [[2, 3]]])
    """
    return by_heads(X, num_heads).flatten(0, 1)


def by_heads(X: Tensor, num_heads: int) -> Tensor:
    """[batch, steps, heads * size] as [batch, heads, steps, size], a view."""
    if X.dim() != 3 or X.shape[-1] % num_heads:
        raise RuntimeError(
            f"X must be [batch, steps, features] with features that num_heads = {num_heads} divides; got {list(X.shape)}. Choose num_hiddens so."
        )
    batch, steps, features = X.shape
    return X.view(batch, steps, num_heads, features // num_heads).transpose(1, 2)


def transpose_output(X: Tensor, num_heads: int) -> Tensor:
    """The inverse of ``transpose_qkv``: [batch * heads, steps, size] as [batch, steps, heads * size].

    Raises:
        RuntimeError: the heads do not divide the first dimension.

    Example:
        >>> X = torch.randn(2, 3, 8)
        >>> transpose_output(transpose_qkv(X, 4), 4).equal(X)
        True
    """
    if X.dim() != 3 or X.shape[0] % num_heads:
        raise RuntimeError(
            f"X must be [batch * heads, steps, size] for num_heads = {num_heads}; got {list(X.shape)}. Pass what transpose_qkv gave."
        )
    return X.reshape(X.shape[0] // num_heads, num_heads, *X.shape[1:]).transpose(1, 2).flatten(2)


def show_heatmaps(
    matrices: Tensor,
    xlabel: str,
    ylabel: str,
    titles: Sequence[str] | None = None,
    figsize: tuple[float, float] = (2.5, 2.5),
    cmap: str = "Reds",
) -> None:
    """Draws matrices [rows, columns, queries, keys] on a new figure of pyplot's; ``fused_attn.viz.show_heatmaps`` returns it.

    Raises:
        ValueError: matrices are not 4-D.
        IndexError: fewer titles than columns.

    Example:
        >>> show_heatmaps(torch.eye(4)[None, None], xlabel="Keys", ylabel="Queries")
    """
    if titles is not None and matrices.dim() == 4 and len(titles) < matrices.shape[1]:
        raise IndexError(f"titles must have one entry per column; got {len(titles)} for {matrices.shape[1]} columns. Add titles.")
    viz.show_heatmaps(matrices, xlabel, ylabel, titles, figsize, cmap)
