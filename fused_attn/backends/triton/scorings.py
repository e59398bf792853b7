"""Scorings on the device: for each name how a tile of scores comes from tiles of queries and keys, and both gradients.

All three are made with ``triton.jit``. ``q_tile`` [BLOCK_Q, head_dim padded] and ``k_tile`` [BLOCK_KV, head_dim padded] hold zeros beyond
head_dim; ``args`` holds the scoring's numbers as floats (bools and None left out), then its tensors as matrices; ``precision`` is how
``tl.dot`` computes float32 ("tf32", "bf16x6" or "ieee").

- ``score(q_tile, k_tile, args, precision)`` gives float32 scores [BLOCK_Q, BLOCK_KV];
- ``dq(ds, q_tile, k_tile, args, precision)`` gives the tile's part of dq [BLOCK_Q, head_dim padded] from that of the scores;
- ``dk(ds, q_tile, k_tile, args, precision)`` gives the tile's part of dk [BLOCK_KV, head_dim padded].

A scoring that lowers to a dot product needs none of them. Those of this package may read columns of q and k (see ``additive``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fused_attn.backends.triton import additive


class Functions(NamedTuple):
    """The device functions of one scoring.

    ``by_columns`` says that they take sources (matrix, b, h, rows, ok) in place of tiles, ``tile`` in place of the precision, and what
    to add a gradient to first; and that its one tensor gets a gradient (``attention_bwd_weight``).
    """

    score: Any
    dq: Any
    dk: Any
    by_columns: bool = False


FUNCTIONS: dict[str, Functions] = {"additive": Functions(additive.score, additive.dq, additive.dk, by_columns=True)}


def register(name: str, score: Any, dq: Any, dk: Any) -> None:
    """Gives a scoring of your own its device functions, all made with ``triton.jit``.

    Example:
        >>> import triton, triton.language as tl
        >>> @triton.jit
        ... def score(q_tile, k_tile, args, precision):
        ...     return tl.dot(q_tile, tl.trans(k_tile), input_precision=precision)
        >>> @triton.jit
        ... def dq(ds, q_tile, k_tile, args, precision):
        ...     return tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=precision)
        >>> @triton.jit
        ... def dk(ds, q_tile, k_tile, args, precision):
        ...     return tl.dot(tl.trans(ds).to(q_tile.dtype), q_tile, input_precision=precision)
        >>> register("plain", score, dq, dk)
        >>> FUNCTIONS.pop("plain").score is score
        True
    """
    FUNCTIONS[name] = Functions(score, dq, dk)
