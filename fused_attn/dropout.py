"""Counter-based dropout: the same keep mask from every backend, tile size and recomputation.

Element (b, h, q, k) draws word ``k % 4`` of Philox4x32-7 (Salmon et al., SC 2011) on the 64-bit counter
``((b * heads + h) * q_len + q) * ceil(kv_len / 4) + k // 4`` with the 64-bit seed as key, and stays when word / 2^32 >= p.
Seven rounds are the fewest that pass BigCrush with a margin; one call serves four neighbouring keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_attn.checks import as_integer, as_number, described, require_tensor
from fused_attn.lowering import Grid, KernelDropout
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

    Example:
        >>> Dropout(0.1, seed=7)
        Dropout(p=0.1, seed=7)
    """

    p: float
    seed: int | Tensor | None = None

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

    def lower(self, device: torch.device) -> KernelDropout:
        """The normal form: p and a seed tensor on ``device``."""
        seed = self.seed
        if seed is None:
            seed = torch.randint(2**63 - 1, (), device=device)
        elif not isinstance(seed, Tensor):
            seed = torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
        return KernelDropout(float(self.p), seed.reshape(()).to(device))


register(Dropout)


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
    _, heads, q_len, kv_len = grid.shape
    (b0, b1), (h0, h1), (q0, q1), (k0, k1) = grid.ranges
    groups, first = -(-kv_len // 4), k0 // 4
    group = torch.arange(first, -(-k1 // 4), device=grid.device)
    b, h, q = (torch.arange(lo, hi, device=grid.device) for lo, hi in ((b0, b1), (h0, h1), (q0, q1)))
    row = (b[:, None, None] * heads + h[:, None]) * q_len + q
    words = torch.stack(philox(row[..., None] * groups + group, dropout.seed), -1).flatten(-2)
    keep = words[..., k0 - 4 * first : k1 - 4 * first] >= threshold(dropout.p)
    return keep.to(dtype) * (1 / (1 - dropout.p) if dropout.p < 1 else 0.0)
