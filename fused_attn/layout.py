"""The one layout rule: results follow an input's order of dimensions in memory, as torch's own attention does.

``out`` lies as ``torch.empty_like(q)`` would (q's order, without q's gaps), a gradient as ``torch.empty_like`` of its input, and what comes
besides (probabilities, statistics) is contiguous. Ops' fakes promise it and kernels allocate by it through these functions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import is_traced


def empty_out(q: Tensor, value_dim: int) -> Tensor:
    """Room for [batch, heads, q_len, value_dim] in q's order.

    Example:
        >>> q = torch.zeros(2, 5, 3, 8).transpose(1, 2)  # [batch, q_len, heads, dim] in memory
        >>> empty_out(q, 4).transpose(1, 2).is_contiguous()
        True
    """
    if value_dim == q.shape[3]:
        return torch.empty_like(q)
    order = _order(q)
    sizes = (*q.shape[:3], value_dim)
    return _restored(q.new_empty([sizes[dim] for dim in order]), order)


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the order of another one of its rank: itself where it lies so, a copy otherwise.

    Example:
        >>> wide = torch.zeros(3, 2).t()
        >>> laid_out_like(torch.zeros(2, 3), wide).stride()
        (1, 2)
    """
    if like.is_contiguous():
        return tensor.contiguous()
    order = _order(like)
    return _restored(tensor.permute(order).contiguous(), order)


def copied_in_rows(tensor: Tensor, unit: int) -> Tensor:
    """A copy in the tensor's order, but with its last dimension innermost, whose rows begin at multiples of ``unit`` elements.

    Example:
        >>> x = torch.arange(10.0).view(5, 2).t()
        >>> copied_in_rows(x, 4).stride(), copied_in_rows(x, 4).equal(x)
        ((8, 1), True)
        >>> copied_in_rows(x.expand(3, 2, 5), 4).stride()
        (0, 8, 1)
    """
    *lengths, size = tensor.shape
    order = [dim for dim in _order(tensor) if dim != len(lengths)]
    once = tensor
    for dim, stride in enumerate(tensor.stride()[:-1]):
        if stride == 0:  # what repeats in memory repeats in the copy
            once = once.narrow(dim, 0, min(1, lengths[dim]))
    room = once.new_empty([*(once.shape[dim] for dim in order), -(-size // unit) * unit])[..., :size]
    return _restored(room, [*order, len(lengths)]).copy_(once).expand(tensor.shape)


def with_laid_out_gradients(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same tensors; whatever gradients arrive at the result reach the originals in the originals' order.

    Example:
        >>> x = torch.zeros(3, 2, requires_grad=True)
        >>> (y,) = with_laid_out_gradients((x,))
        >>> torch.autograd.grad(y, x, torch.ones(2, 3).t())[0].stride()
        (2, 1)
    """
    if is_traced():  # a trace keeps operators, not Functions
        return tensors
    # Views, because one tensor may stand in several places.
    wanting = [t.view_as(t) for t in tensors if t.requires_grad]
    kept = list(_LaidOutGradients.apply(*wanting)) if wanting else []  # type: ignore[no-untyped-call]
    # Lists, here and in the Function: torch 2.14's Dynamo does not run generators around a Function.
    return tuple([kept.pop(0) if t.requires_grad else t for t in tensors])


class _LaidOutGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        return tuple([t.view_as(t) for t in tensors])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return tuple([g if g is None else laid_out_like(g, t) for g, t in zip(grads, ctx.saved_tensors, strict=True)])


def _order(like: Tensor) -> list[int]:
    """Dimensions from the outermost in memory to the innermost, by torch's own answer where strides are ambiguous (0, or gaps)."""
    strides = torch.empty_like(like, device="meta").stride()
    order: list[int] = []
    for dim in range(like.dim()):  # an insertion sort: Dynamo compares symbolic strides, but does not sort by them
        place = len(order)
        while place > 0 and strides[order[place - 1]] < strides[dim]:
            place -= 1
        order.insert(place, dim)
    return order


def _restored(permuted: Tensor, order: list[int]) -> Tensor:
    return permuted.permute([order.index(dim) for dim in range(len(order))])
