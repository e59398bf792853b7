"""Which layers a stack has and in which order they run: "a" attends, "c" attends to a context, "f" feeds forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fused_attn.nn.x_transformers.refusals import needs

Order = tuple[int, ...]


@dataclass(frozen=True)
class LayerOrder:
    """Types of layers, the places they run in, and how many make a block.

    Example:
        >>> LayerOrder.of(2, {"cross_attend": True})
        LayerOrder(types=('a', 'c', 'f', 'a', 'c', 'f'), order=(0, 1, 2, 3, 4, 5), block=3, depth=2)
        >>> LayerOrder.of(2, {"weight_tie_layers": True}).order
        (0, 1, 0, 1)
    """

    types: tuple[str, ...]
    order: Order
    block: int
    depth: int

    @classmethod
    def of(cls, depth: int | None, options: dict[str, Any]) -> LayerOrder:
        """From the options of ``AttentionLayers`` that say it."""
        given = _Given(depth, **{name: options[name] for name in _NAMES if name in options})
        given.check()
        block = given.block
        order = given.layers_execute_order
        if given.weight_tie_layers:
            order, given.depth = tuple(range(len(block))) * (depth or 1), 1
        types, size = given.types(block)
        types = tuple(t for t in types if not (given.only_attn and t == "f"))
        order = tuple(range(len(types))) if order is None else order
        needs(all(i < len(types) for i in order), f"layers_execute_order must name layers below {len(types)}", repr(order), "Count from 0")
        needs(set(types) <= {"a", "c", "f"}, "custom_layers must be of 'a', 'c' and 'f'", repr(types), "Use those letters")
        return cls(types, order, size, given.depth if given.depth is not None else len(order))

    def repeated(self, blocks: Any) -> Order:
        """The order in which blocks run several times: a tuple of block indices, in turn."""
        count = len(self.types) // self.block
        return tuple(i * self.block + n for i in repeated_blocks(blocks, count) for n in range(self.block))


_NAMES = ("cross_attend", "only_cross", "macaron", "only_attn", "weight_tie_layers", "custom_layers", "layers_execute_order", "par_ratio", "sandwich_coef")  # fmt: skip


@dataclass
class _Given:
    depth: int | None
    cross_attend: bool = False
    only_cross: bool = False
    macaron: bool = False
    only_attn: bool = False
    weight_tie_layers: bool = False
    custom_layers: tuple[str, ...] | None = None
    layers_execute_order: Order | None = None
    par_ratio: int | None = None
    sandwich_coef: int | None = None

    def check(self) -> None:
        ordered, custom = self.layers_execute_order is not None, self.custom_layers is not None
        needs(
            not (ordered and custom and self.depth is not None),
            "depth must be left out with layers and their order",
            repr(self.depth),
            "Count them",
        )
        special = [n for n in ("custom_layers", "par_ratio", "sandwich_coef", "layers_execute_order") if getattr(self, n) is not None]
        needs(not (self.weight_tie_layers and special), "weight_tie_layers must come alone", ", ".join(special), "Leave the others out")
        needs(not (self.only_attn and ordered), "only_attn must come without layers_execute_order", "both", "Choose one")
        needs(not (self.only_attn and "f" in (self.custom_layers or ())), "only_attn must come without 'f' layers", "'f'", "Leave them out")
        needs(
            not self.weight_tie_layers or self.depth is not None,
            "depth must be given with weight_tie_layers",
            "None",
            "Pass how often to run",
        )

    @property
    def block(self) -> tuple[str, ...]:
        block = ("a",) if not self.cross_attend else ("c",) if self.only_cross else ("a", "c")
        block = (*(("f",) if self.macaron else ()), *block, "f")
        return tuple(t for t in block if not (self.only_attn and t == "f"))

    def types(self, block: tuple[str, ...]) -> tuple[tuple[str, ...], int]:
        """Types of all layers, and how many make a block."""
        if self.custom_layers is not None:
            return tuple(self.custom_layers), 1
        needs(self.depth is not None, "depth must be given", "None", "Pass how many blocks there are")
        depth = self.depth or 0
        if self.par_ratio is not None:
            return self._par(block, depth, self.par_ratio), 1
        if self.sandwich_coef is not None:
            n = self.sandwich_coef
            needs(0 < n <= depth, f"sandwich_coef must be in [1, {depth}]", repr(n), "Lower it")
            return ("a",) * n + block * (depth - n) + ("f",) * n, 1
        return block * depth, len(block)

    @staticmethod
    def _par(block: tuple[str, ...], depth: int, ratio: int) -> tuple[str, ...]:
        """Attention in the first two thirds, at a share of one in ``ratio`` layers (arXiv 2009.04534)."""
        total = depth * len(block)
        needs(1 < ratio <= total, f"par_ratio must be in [2, {total}]", repr(ratio), "Change it")
        block = tuple(t for t in block if t != "f")
        count, cut = total // ratio, total * 2 // 3
        width = (cut + cut // count) // count
        needs(len(block) <= width, f"par_ratio must leave room for {len(block)} layers", repr(ratio), "Raise it")
        head = (block + ("f",) * (width - len(block))) * count
        return head + ("f",) * (total - len(head))


def repeated_blocks(blocks: Any, count: int) -> list[int]:
    """Block indices of ``count`` blocks, where ``((start, end), times)`` or ``(start, times)`` entries run several times.

    Example:
        >>> repeated_blocks(((1, 2), 2), 4)
        [0, 1, 2, 1, 2, 3]
    """
    entries = (blocks,) if len(blocks) == 2 and isinstance(blocks[1], int) else blocks
    spans = {}
    for span, times in entries:
        first, last = span if isinstance(span, tuple) else (span, span)
        needs(first <= last < count, f"repeat_blocks must name blocks in order, below {count}", repr(span), "Count blocks from 0")
        spans[first] = (last, times)
    found: list[int] = []
    block = 0
    while block < count:
        last, times = spans.get(block, (block, 1))
        found += [*range(block, last + 1)] * times
        block = last + 1
    return found
