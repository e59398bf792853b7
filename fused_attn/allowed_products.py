"""Products over allowed pairs alone: what sits in a pair that may not attend reaches nothing, forward and backward.

A product of whole matrices multiplies masked pairs by zero, and 0 * NaN is NaN. Here every element of a result is what IEEE arithmetic
gives for the allowed pairs only: one NaN or infinity among them shows, one among the others does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_attn.checks import captured, is_traced


def sum_over_allowed(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    """Sums weights[..., i, k] * values[..., k, j] over the allowed k of each i.

    Args:
        weights: [..., m, n], zero where not allowed.
        values: [..., n, d].
        allowed: bool, broadcastable to [..., m, n].

    Example:
        >>> weights, values = torch.tensor([[0.5, 0.0], [0.5, 0.5]]), torch.tensor([[2.0], [torch.nan]])
        >>> sum_over_allowed(weights, values, torch.tensor([[True, False], [True, True]]))
        tensor([[1.],
                [nan]])
    """
    finite = values.isfinite()
    if not captured(values) and bool(finite.all()):
        return weights @ values
    clean = weights @ values.masked_fill(~finite, 0.0)
    infinite = values.isinf().to(values.dtype) * values.nan_to_num(0.0, 1.0, -1.0).sign()
    reached = allowed.expand(weights.shape).to(values.dtype) @ (~finite).to(values.dtype)
    # Infinities of one sign are one; anything else that is not finite (0 * infinity among it) makes a NaN.
    signed = weights.sign() @ infinite
    broken = torch.where(signed.abs() == reached, signed * torch.inf, torch.nan)
    return torch.where(reached > 0, broken + clean, clean)


def products_of_allowed(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
    """a b^T [..., m, n] where allowed and zero elsewhere, from a [..., m, d] and b [..., n, d].

    Example:
        >>> products_of_allowed(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [torch.inf]]), torch.eye(2, dtype=torch.bool))
        tensor([[3., 0.],
                [0., inf]])
    """
    return (a @ b.mT).masked_fill(~allowed, 0.0)


class _Differentiable(torch.autograd.Function):
    """Each of the two products is the other's derivative."""

    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)


class _Products(_Differentiable):
    @staticmethod
    def forward(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
        return products_of_allowed(a, b, allowed)

    @staticmethod
    def backward(ctx: Any, arriving: Any) -> Any:
        a, b, allowed = ctx.saved_tensors
        arriving = arriving.masked_fill(~allowed, 0.0)
        return _sums(arriving, b, allowed), _sums(arriving.mT, a, allowed.mT), None


class _Sums(_Differentiable):
    @staticmethod
    def forward(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
        return sum_over_allowed(weights, values, allowed)

    @staticmethod
    def backward(ctx: Any, arriving: Any) -> Any:
        weights, values, allowed = ctx.saved_tensors
        return _products(arriving, values, allowed), _sums(weights.mT, arriving, allowed.mT), None


class _ForwardProducts(_Products):
    @staticmethod
    def jvp(ctx: Any, da: Any, db: Any, _: Any) -> Any:
        a, b, allowed = ctx.saved_tensors
        return products_of_allowed(da, b, allowed) + products_of_allowed(a, db, allowed)


class _ForwardSums(_Sums):
    @staticmethod
    def jvp(ctx: Any, dweights: Any, dvalues: Any, _: Any) -> Any:
        weights, values, allowed = ctx.saved_tensors
        return sum_over_allowed(dweights, values, allowed) + sum_over_allowed(weights, dvalues, allowed)


def _apply(function: Any, with_jvp: Any, a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
    if is_traced():
        return _traced(function.forward, a, b, allowed)
    # Dynamo takes no Function with a rule for forward mode.
    return (function if torch.compiler.is_compiling() else with_jvp).apply(a, b, allowed)  # type: ignore[no-any-return]


def _products(a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
    return _apply(_Products, _ForwardProducts, a, b, allowed)


def _sums(weights: Tensor, values: Tensor, allowed: Tensor) -> Tensor:
    return _apply(_Sums, _ForwardSums, weights, values, allowed)


def _traced(product: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor, allowed: Tensor) -> Tensor:
    """A product for torch.jit.trace, which keeps operators and forgets Functions: the gradient is that of finite operands."""
    clean = product(a.masked_fill(~a.isfinite(), 0.0), b.masked_fill(~b.isfinite(), 0.0), allowed)
    return clean + (product(a.detach(), b.detach(), allowed) - clean.detach())


def differentiable_products(a: Tensor, b: Tensor, allowed: Tensor | None) -> Tensor:
    """``products_of_allowed``, differentiable any number of times; plain a b^T where everything is allowed.

    Example:
        >>> a, b = torch.ones(2, 1, requires_grad=True), torch.tensor([[1.0], [torch.nan]])
        >>> out = differentiable_products(a, b, torch.tensor([[True, False], [True, False]]))
        >>> torch.autograd.grad(out.sum(), a)[0].tolist()
        [[1.0], [1.0]]
    """
    return a @ b.mT if allowed is None else _products(a, b, allowed)


def differentiable_sum(weights: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
    """``sum_over_allowed``, differentiable any number of times; plain weights values where everything is allowed.

    Example:
        >>> values = torch.tensor([[1.0], [torch.inf]], requires_grad=True)
        >>> differentiable_sum(torch.tensor([[1.0, 0.0]]), values, torch.tensor([[True, False]])).item()
        1.0
    """
    return weights @ values if allowed is None else _sums(weights, values, allowed)
