"""Where DTensors lie: which part of a call's dimensions is this process', brought there and back again.

torch.distributed.tensor is imported where a DTensor has come, which has imported it: it takes a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fused_attn import dropout as plain
from fused_attn.checks import is_sharded, reduced
from fused_attn.dropout import Dropout
from fused_attn.lowering import Range

# Which dimension of a tensor is which of the call's [batch, heads, q_len, kv_len].
Axes = Mapping[int, int]


@dataclass(frozen=True)
class Layout:
    """Which dimension of [batch, heads, q_len, kv_len] each dimension of a mesh divides.

    Args:
        mesh: the DeviceMesh.
        divides: 0 for the batch, 1 for heads, 2 for queries, None where all ranks along that dimension compute the same.
    """

    mesh: Any
    divides: tuple[int | None, ...]

    @classmethod
    def of(cls, q: Any, others: tuple[Any, ...]) -> Layout:
        """The layout of q's placements, or of the others' where q is the same on all ranks; queries are divided only as q is.

        Raises:
            TypeError: only some of them are DTensors.
            ValueError: they are on several meshes.
        """
        tensors = (q, *others)
        if not all(map(is_sharded, tensors)):
            got = ", ".join("a DTensor" if is_sharded(t) else "a plain tensor" for t in tensors)
            raise TypeError(f"q, k and v must all be DTensors, or none of them; got {got}. Use distribute_tensor or DTensor.from_local.")
        if any(t.device_mesh != q.device_mesh for t in others):
            raise ValueError(
                f"q, k and v must be on one mesh; got {', '.join(str(t.device_mesh) for t in tensors)}. Distribute them alike."
            )
        return cls(q.device_mesh, tuple([_divided(i, q, others) for i in range(q.device_mesh.ndim)]))

    def range_of(self, dim: int, size: int) -> Range:
        """What this rank has of a dimension of the call, in chunks as torch.chunk makes them; nothing outside of the mesh."""
        start, end, coordinate = 0, size, self.mesh.get_coordinate()
        if coordinate is None:
            return 0, 0 if dim in self.divides else size
        for along, divided in enumerate(self.divides):
            if divided == dim:
                chunk = -(-(end - start) // self.mesh.size(along))
                first = min(start + chunk * coordinate[along], end)
                start, end = first, min(first + chunk, end)
        return start, end

    def count(self, dim: int) -> int:
        """How many ranks divide a dimension of the call."""
        result = 1
        for along, divided in enumerate(self.divides):
            result *= self.mesh.size(along) if divided == dim else 1
        return result

    def local(self, tensor: Any, axes: Axes) -> Tensor:
        """This rank's part of a tensor along the dimensions that ``axes`` names, all of it along the others; gradients add up to the whole's.

        A plain tensor counts as the same on every rank.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if not is_sharded(tensor):
            if not tensor.requires_grad:
                for dim, axis in axes.items():
                    start, end = self.range_of(dim, tensor.shape[axis])
                    tensor = tensor.narrow(axis, start, end - start)
                return tensor  # type: ignore[no-any-return]
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        if tensor.device_mesh != self.mesh:
            raise ValueError(f"a DTensor of the call must be on q's mesh {self.mesh}; got {tensor.device_mesh}. Distribute it there.")
        if self.mesh.get_coordinate() is None:
            divided = [axis for dim, axis in axes.items() if dim in self.divides]
            sizes = [0 if axis in divided else n for axis, n in enumerate(tensor.shape)]
            return torch.zeros(sizes, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad)
        held = [Shard(axes[d]) if d is not None and d in axes else Replicate() for d in self.divides]
        shares = [Partial() if d is not None and d not in axes else p for d, p in zip(self.divides, held, strict=True)]
        result: Tensor = tensor.redistribute(placements=held).to_local(grad_placements=shares)
        return _Defined.apply(result) if result.requires_grad else result  # type: ignore[no-untyped-call]

    def everywhere(self, value: Any) -> Any:
        """A value whose tensors, at any depth, are whole on this rank."""
        return tree_map_only(Tensor, lambda t: self.local(t, {}), value)

    def whole(self, local: Tensor, shape: tuple[int, ...], axes: Axes) -> Tensor:
        """The DTensor of all ranks' parts; along a dimension of the call that is not among ``axes``, they add up."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        placements = [Replicate() if d is None else Shard(axes[d]) if d in axes else Partial() for d in self.divides]
        result: Tensor = DTensor.from_local(
            local, self.mesh, placements, run_check=False, shape=torch.Size(shape), stride=_strides(shape, local)
        )
        return result


class _Defined(torch.autograd.Function):
    """The same tensor; where no gradient comes for it, zeros do: torch 2.13's ``redistribute`` fails on none."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _divided(along: int, q: Any, others: tuple[Any, ...]) -> int | None:
    """What a dimension of the mesh divides."""
    for tensor, dims in ((q, 3), *((t, 2) for t in others)):
        dim = sharded_dim(tensor.placements[along])
        if dim is not None and dim < dims:
            return dim
    return None


def sharded_dim(placement: Any) -> int | None:
    """Which dimension of its tensor a placement divides; DTensors know no negative ones."""
    from torch.distributed.tensor import Shard

    return placement.dim if type(placement) is Shard else None


def _strides(shape: tuple[int, ...], local: Tensor) -> tuple[int, ...]:
    """Strides of a whole tensor whose dimensions lie in memory as those of a part; sizes and strides may be symbols, which no sort takes."""

    def is_within(inner: int, outer: int) -> bool:
        a, b = local.stride(inner), local.stride(outer)
        return bool(a < b) or (bool(a == b) and inner > outer)

    dims = range(len(shape))
    return tuple([prod([max(1, shape[inner]) for inner in dims if is_within(inner, outer)]) for outer in dims])


def drawn(dropout: Dropout | None, like: Any) -> Dropout | None:
    """Dropout whose seed is drawn, if it has none; the first rank's for all of a DTensor's, so that those that compute the same remove the same.

    Example:
        >>> drawn(Dropout(0.5), torch.zeros(2)).seed.dtype
        torch.int64
    """
    if dropout is None or dropout.seed is not None:
        return dropout
    seed: Any = dropout.lower(like.device).seed
    place = like.device_mesh.get_coordinate() if is_sharded(like) else None
    if place is not None:
        # A sum to which one rank adds: compilers follow it, and distribute_tensor they do not.
        seed = reduced(torch.zeros_like(seed) if any(place) else seed, like.device_mesh, "sum")
    return replace(dropout, seed=seed)


def dropped(probs: Tensor, dropout: Dropout) -> Tensor:
    """``fused_attn.dropout.dropped``, also of a DTensor [batch, heads, q_len, kv_len]."""
    if not is_sharded(probs):
        return plain.dropped(probs, dropout)
    layout, axes = Layout.of(probs, ()), {0: 0, 1: 1, 2: 2}
    batch, heads, q_len, kv_len = probs.shape
    start = [layout.range_of(dim, size)[0] for dim, size in enumerate((batch, heads, q_len))]
    part = dropout.part((*start, 0), (batch, heads, q_len, kv_len))  # type: ignore[arg-type]
    return layout.whole(plain.dropped(layout.local(probs, axes), part), tuple(probs.shape), axes)
