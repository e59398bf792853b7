"""What context parallelism costs: bytes that a rank sends and FLOPs that it computes, by method, and how long that takes on a machine.

The bytes are exactly those that ``traffic.counted`` records where no step is left out; ``docs/scaling.md`` says when which method wins.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """An attention layer of a long sequence.

    Args:
        batch, heads, kv_heads, head_dim: as ``attention`` has them; value_dim is head_dim.
        length: of the whole sequence.
        itemsize: bytes of an element.
        causal: whether half of the pairs is masked; in zigzag order every rank has the same half.
    """

    batch: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    length: int = 1 << 20
    itemsize: int = 2
    causal: bool = True


@dataclass(frozen=True)
class Cost:
    """Of one rank.

    Args:
        forward_bytes: sent in the forward.
        backward_bytes: sent in the backward.
        forward_flops: of the forward's two products.
        backward_flops: of the backward's five products, and of the forward again where it is recomputed.
        memory: bytes of keys and values (and their gradients on their way) beyond this rank's own rows.
    """

    forward_bytes: float
    backward_bytes: float
    forward_flops: float
    backward_flops: float
    memory: float

    def seconds(self, flops: float, bandwidth: float, behind: bool) -> float:
        """Forward and backward on ranks of ``flops`` FLOP/s that send ``bandwidth`` bytes/s; ``behind``: transfers overlap with computation."""
        pairs = ((self.forward_flops, self.forward_bytes), (self.backward_flops, self.backward_bytes))
        return sum((max if behind else _sum)(f / flops, b / bandwidth) for f, b in pairs)


def _sum(a: float, b: float) -> float:
    return a + b


def cost(work: Workload, ranks: int, method: str) -> Cost | None:
    """What a method costs each rank; None where its heads do not divide.

    Example:
        >>> work = Workload(length=1024, heads=8, kv_heads=8, head_dim=64)
        >>> [int(cost(work, 8, method).forward_bytes) for method in ("ring", "gather", "heads")]
        [1835008, 1835008, 458752]
    """
    rows = work.length // ranks
    one_head = work.batch * rows * work.head_dim * work.itemsize
    keys = 2 * one_head * work.kv_heads
    product = 2 * work.batch * work.heads * rows * work.length * work.head_dim * (0.5 if work.causal else 1.0)
    forward, backward = 2 * product, 5 * product
    others = ranks - 1
    if method == "ring":  # two shards on their way, and the gradients of one
        return Cost(others * keys, 2 * others * keys, forward, backward + forward, min(others, 2) * keys + min(others, 1) * 2 * keys)
    if method == "gather":
        return Cost(others * keys, others * keys, forward, backward, 2 * others * keys)
    if work.heads % ranks or (work.kv_heads % ranks and ranks % work.kv_heads):
        return None
    heads = 2 * work.heads + 2 * max(work.kv_heads, ranks if work.kv_heads % ranks else 0)
    sent = others / ranks * one_head * heads
    return Cost(sent, sent, forward, backward, others / ranks * one_head * heads)
