"""Counter-based dropout: the same keep mask from every backend, tile size and recomputation.

Element (b, h, q, k) draws word ``k % 4`` of Philox4x32-7 (Salmon et al., SC 2011) on the 64-bit counter
``((b * heads + h) * q_len + q) * ceil(kv_len / 4) + k // 4`` with the 64-bit seed as key, and stays when word / 2^32 >= p.
Indices and sizes are those of the whole problem, so that a call on a part of it draws what the whole would have drawn there.
Seven rounds are the fewest that pass BigCrush with a margin; one call serves four neighbouring keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import as_integer, as_number, captured, described, require_tensor
from fused_attn.kernel_dropout import KernelDropout, Sizes
from fused_attn.lowering import Grid
from fused_attn.pytrees import register

ROUNDS = 7
# Constants of Philox4x32 in the paper's Table 2: two multipliers and two Weyl increments.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Dropout:
    """Zeroes each probability with chance p and scales the others by 1 / (1 - p); probabilities given out are the ones before.

    Args:
        p: chance of removal, in [0, 1].
        seed: an int, or an int64 tensor [] on the inputs' device; None draws one from torch's generator at each call, so
            ``torch.manual_seed`` and activation checkpointing act on it as on torch's own dropout.
        origin: index of the call's first (batch, head, query, key) in the whole problem; see ``part``.
        extent: (batch, heads, q_len, kv_len) of the whole problem; None where the call is the whole.

    Raises:
        ValueError: p is no chance, the seed has more than 64 bits, or the origin lies outside the extent.
        TypeError: an argument is no number.

    Example:
        >>> Dropout(0.1, seed=7).part((0, 4, 0, 0), (2, 8, 128, 128)).origin
        (0, 4, 0, 0)
    """

    p: float
    seed: int | Tensor | None = None
    origin: Sizes = (0, 0, 0, 0)
    extent: Sizes | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= as_number("Dropout p", self.p, "Pass a chance in [0, 1].") <= 1.0:
            raise ValueError(f"Dropout p must be in [0, 1]; got {self.p}. It is the chance of removal, not of keeping.")
        if isinstance(self.seed, Tensor):
            require_tensor("Dropout seed", self.seed, (torch.int64,), "an int or one int64 number", "Use torch.tensor(seed).")
            if self.seed.numel() != 1:
                raise ValueError(f"Dropout seed must be one int64 number; got {described(self.seed)}. Use torch.tensor(seed).")
        elif (
            self.seed is not None and not -(2**63) <= as_integer("Dropout seed", self.seed, "Pass an int, an int64 tensor or None.") < 2**64
        ):
            raise ValueError(f"Dropout seed must fit in 64 bits; got {self.seed}. Take it modulo 2**64.")
        if self.extent is not None or self.origin != (0, 0, 0, 0):
            self._check_place()

    def _check_place(self) -> None:
        object.__setattr__(self, "origin", _sizes("origin", self.origin))
        if self.extent is None:
            raise ValueError(f"Dropout extent must be given with an origin; got origin={self.origin}. Pass the whole problem's {_LAYOUT}.")
        object.__setattr__(self, "extent", _sizes("extent", self.extent))
        if prod(self.extent) >= 2**62:
            raise ValueError(f"Dropout extent must count less than 2**62 elements; got {self.extent}. Pass the whole problem's {_LAYOUT}.")
        self.check((0, 0, 0, 0))

    def check(self, shape: Sizes) -> None:
        """Raises ValueError unless a call of that shape lies inside the whole problem."""
        if self.extent is not None and any(o + n > whole for o, n, whole in zip(self.origin, shape, self.extent, strict=True)):
            raise ValueError(
                f"Dropout origin and the call's sizes {list(shape)} must lie within the extent; got origin={self.origin}, "
                f"extent={self.extent}. Pass the first index of this part and the whole problem's {_LAYOUT}."
            )

    def part(self, start: Sizes, whole: Sizes) -> Dropout:
        """The dropout of a part of a call: what it draws there is what this dropout draws in the whole.

        Args:
            start: index of the part's first (batch, head, query, key) in the call.
            whole: (batch, heads, q_len, kv_len) of the call.

        Example:
            >>> import fused_attn as fa
            >>> q, dropout = torch.randn(2, 4, 6, 8), Dropout(0.5, seed=1)
            >>> out = fa.attention(q, q, q, dropout=dropout)
            >>> half = fa.attention(q[1:], q[1:], q[1:], dropout=dropout.part((1, 0, 0, 0), (2, 4, 6, 6)))
            >>> torch.allclose(half, out[1:])
            True
        """
        self.check(whole)
        (b, h, q, k), moved = self.origin, _sizes("start", start)
        if any(first > size for first, size in zip(moved, _sizes("whole", whole), strict=True)):
            raise ValueError(
                f"a part must begin within the call's sizes {list(whole)}; got start {list(start)}. Count from the call's first element."
            )
        origin = (b + moved[0], h + moved[1], q + moved[2], k + moved[3])
        return replace(self, origin=origin, extent=_sizes("extent", whole) if self.extent is None else self.extent)

    def lower(self, device: torch.device) -> KernelDropout:
        """The normal form: p and a seed tensor on ``device``."""
        seed = self.seed
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=device)
        elif not isinstance(seed, Tensor):
            seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
        return KernelDropout(float(self.p), seed.reshape(()).to(device), self.origin, self.extent)


register(Dropout)

_LAYOUT = "(batch, heads, q_len, kv_len)"


def _sizes(name: str, value: Any) -> Sizes:
    """Four ints that are not negative."""
    if not isinstance(value, (tuple, list)) or len(value) != 4:
        raise TypeError(f"Dropout {name} must be four ints {_LAYOUT}; got {described(value)}. Write {name}=(0, 0, 64, 0).")
    batch, heads, q_len, kv_len = (as_integer(f"Dropout {name}", n, f"Pass four ints {_LAYOUT}.") for n in value)
    if min(batch, heads, q_len, kv_len) < 0:
        raise ValueError(f"Dropout {name} must not be negative; got {tuple(value)}. Count indices and sizes from 0 on.")
    return batch, heads, q_len, kv_len


def philox(counter: Tensor, seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-7 on int64 counters (high words zero): four int64 tensors that hold 32-bit words.

    Example:
        >>> [hex(int(w)) for w in philox(torch.tensor(0), torch.tensor(0))]
        ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    words = [counter & _WORD, (counter >> 32) & _WORD, torch.zeros_like(counter), torch.zeros_like(counter)]
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(ROUNDS):
        # The 64-bit product wraps as two's complement; its bits are still those of the unsigned one.
        first, second = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [
            ((second >> 32) & _WORD) ^ words[1] ^ keys[0],
            second & _WORD,
            ((first >> 32) & _WORD) ^ words[3] ^ keys[1],
            first & _WORD,
        ]
        keys = [(key + step) & _WORD for key, step in zip(keys, WEYL, strict=True)]
    return words[0], words[1], words[2], words[3]


def threshold(p: float) -> int:
    """The smallest 32-bit word that stays: round(p * 2^32), at most 2^32.

    Example:
        >>> threshold(0.5) == 2**31
        True
    """
    return min(round(p * 2**32), 2**32)


def keep_factor(dropout: KernelDropout, grid: Grid, dtype: torch.dtype) -> Tensor:
    """0 for removed elements of the grid's region and 1 / (1 - p) for the others, [batch, heads, q, kv]."""
    (first, *strides), shift = dropout.counters(grid.shape)
    *rows, (k0, k1) = grid.ranges
    k0, k1 = k0 + shift, k1 + shift
    b, h, q = (torch.arange(*range, device=grid.device) * stride for range, stride in zip(rows, strides, strict=True))
    group = torch.arange(k0 // 4, -(-k1 // 4), device=grid.device)
    counter = (first + b[:, None, None] + h[:, None] + q)[..., None] + group
    words = torch.stack(philox(counter, dropout.seed), -1).flatten(-2)
    keep = words[..., k0 % 4 : k0 % 4 + k1 - k0] >= threshold(dropout.p)
    return keep.to(dtype) * (1 / (1 - dropout.p) if dropout.p < 1 else 0.0)


# Elements whose random words exist at a time, int64: 2 MB.
_BLOCK = 1 << 18


def dropped(probs: Tensor, dropout: Dropout) -> Tensor:
    """Probabilities of a whole grid after dropout, by blocks of queries, for the counters take eight times their room.

    Args:
        probs: [batch, heads, q_len, kv_len]; written to unless they require grad, or values cannot be looked at.
        dropout: what ``attention`` removed.

    Example:
        >>> set(dropped(torch.ones(1, 1, 4, 4), Dropout(0.5, seed=1)).flatten().tolist()) == {0.0, 2.0}
        True
    """
    lowered = dropout.lower(probs.device)
    grid = Grid((probs.shape[0], probs.shape[1], probs.shape[2], probs.shape[3]), probs.device)
    if captured(probs):
        return probs * keep_factor(lowered, grid, probs.dtype)
    factor = torch.empty_like(probs) if probs.requires_grad else None
    batches, heads, (_, end), keys = grid.ranges
    rows = max(1, _BLOCK // max(1, probs[:, :, :1].numel()))
    for row in range(0, end, rows):
        part = keep_factor(lowered, grid.at(batches, heads, (row, min(row + rows, end)), keys), probs.dtype)
        if factor is None:
            probs[:, :, row : row + rows] *= part
        else:
            factor[:, :, row : row + rows] = part
    return probs if factor is None else probs * factor
