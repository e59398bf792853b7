"""A module of another kind beside the attention of a layer, a recurrent one for instance, their outputs normalised and mixed (arXiv 2411.13676)."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._pytree import tree_flatten, tree_unflatten

from fused_attn.nn.x_transformers.intermediates import Intermediates
from fused_attn.nn.x_transformers.norms import MultiheadRMSNorm


class FoldAxially(nn.Module):
    """A module that sees every ``axial_dim``-th position, the others as sequences of their own.

    Example:
        >>> import torch
        >>> FoldAxially(2, nn.Identity())(torch.arange(3.0).view(1, 3, 1)).flatten()
        tensor([0., 1., 2.])
    """

    def __init__(self, axial_dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.axial_dim, self.fn = axial_dim, fn

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [batch, length, ...]; the first tensor of the module's output is folded back."""
        if self.axial_dim == 1:
            return self.fn(x, *args, **kwargs)
        length, step = x.shape[1], self.axial_dim
        padded = pad(x, (0, 0) * (x.dim() - 2) + (0, -length % step))
        folded = padded.unflatten(1, (-1, step)).transpose(1, 2).flatten(0, 1)
        (out, *rest), spec = tree_flatten(self.fn(folded, *args, **kwargs))
        out = out.unflatten(0, (-1, step)).transpose(1, 2).flatten(1, 2)[:, :length]
        return tree_unflatten((out, *rest), spec)


class Hybrid(nn.Module):
    """What an attention layer does with a module beside it."""

    heads: int

    def _beside(self, module: nn.Module | None, options: tuple[str | None, int | None, bool], sizes: tuple[int, int]) -> None:
        self.hybrid_mask_kwarg, fold, learned = options
        dim, value_dim = sizes
        self.hybrid_module: nn.Module | None = None
        self.hybrid_norms: nn.ModuleList | None = None
        self.hybrid_mix: nn.Linear | None = None
        if module is None:
            return
        self.hybrid_module = deepcopy(module) if fold is None else FoldAxially(fold, deepcopy(module))
        self.hybrid_norms = nn.ModuleList([MultiheadRMSNorm(value_dim, self.heads) for _ in range(2)])
        self.hybrid_mix = nn.Linear(dim, self.heads, bias=False) if learned else None

    def _with_hybrid(self, x: Tensor, out: Tensor, mask: Tensor | None, cache: Intermediates | None, left: Intermediates) -> Tensor:
        """out [batch, heads, length, value_dim] mixed with what the module makes of x; ``left`` keeps the module's state."""
        if self.hybrid_module is None or self.hybrid_norms is None:
            return out
        state = () if cache is None or cache.hybrid_hidden is None else (cache.hybrid_hidden,)
        keywords = {} if self.hybrid_mask_kwarg is None else {self.hybrid_mask_kwarg: mask}
        (other, *rest), _ = tree_flatten(self.hybrid_module(x, *state, **keywords))
        other = other.unflatten(-1, (self.heads, -1)).transpose(1, 2) if other.dim() == 3 else other
        left.hybrid_hidden = rest[0] if rest else None
        out, other = self.hybrid_norms[0](out), self.hybrid_norms[1](other)
        share: Any = 0.5 if self.hybrid_mix is None else self.hybrid_mix(x).sigmoid().transpose(1, 2)[..., None]
        mixed: Tensor = out + (other - out) * share
        return mixed
