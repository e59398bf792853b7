"""Grouped heads in x-transformers' order, query head n with key head n % kv_heads, for kernels that pair it with n // (heads // kv_heads)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fused_attn.score_mods import ALiBi, Bias, DecayBias, ScoreMod


@dataclass(frozen=True)
class HeadOrder:
    """Carries what has a dimension of heads from the package's order into the kernels' and back; keys and values stay where they are.

    Example:
        >>> import torch
        >>> order = HeadOrder(4, 2)
        >>> order.grouped(torch.tensor([0, 1, 2, 3]), 0), order.tiled(torch.tensor([0, 2, 1, 3]), 0)
        (tensor([0, 2, 1, 3]), tensor([0, 1, 2, 3]))
    """

    heads: int
    kv_heads: int

    @property
    def is_same(self) -> bool:
        """Whether both orders are one."""
        return self.kv_heads in (1, self.heads)

    def grouped(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """From tiled to grouped; a dimension that repeats for all heads stays."""
        return self._swapped(tensor, dim, (self.heads // self.kv_heads, self.kv_heads))

    def tiled(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """The inverse of ``grouped``."""
        return self._swapped(tensor, dim, (self.kv_heads, self.heads // self.kv_heads))

    def _swapped(self, tensor: Tensor, dim: int, sizes: tuple[int, int]) -> Tensor:
        if self.is_same or tensor.dim() < (-dim if dim < 0 else dim + 1) or tensor.shape[dim] == 1:
            return tensor
        dim %= tensor.dim()
        parts: Tensor = tensor.unflatten(dim, sizes)
        return parts.transpose(dim, dim + 1).flatten(dim, dim + 1)

    def of_mod(self, mod: ScoreMod) -> ScoreMod:
        """A modification whose tensors are in the kernels' order."""
        if isinstance(mod, ALiBi):
            return ALiBi(self.grouped(mod.slopes, -1))
        if isinstance(mod, DecayBias):
            return DecayBias(self.grouped(mod.c, -2))
        return Bias(self.grouped(mod.bias, -3)) if isinstance(mod, Bias) else mod
