"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fused_attn.backends import eager
from fused_attn.nn.x_transformers import Attend, CoPE, Intermediates, dense
from tests.golden_cases import Case, Runner, gradients

ARRAYS = ("qk_similarities", "pre_softmax", "post_softmax")


@contextmanager
def injected(case: Case) -> Iterator[None]:
    """Noise and removed weights as the case has them, where this package draws its own."""
    aux, draw = case.below("aux"), torch.Tensor.exponential_

    def exponential(tensor: Tensor, *args: Any) -> Tensor:
        return tensor.copy_((-aux["gumbel"]).exp()) if "gumbel" in aux else draw(tensor, *args)

    def keep(dropout: Any, grid: Any, dtype: torch.dtype) -> Tensor:
        return aux["dropout_keep"].to(dtype) / (1 - dropout.p)

    with (
        patch.object(torch.Tensor, "exponential_", exponential),
        patch.object(eager, "keep_factor", keep),
        patch.object(dense, "keep_factor", keep),
    ):
        yield


def leaves(case: Case, module: torch.nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The case's inputs, and every tensor that a gradient is asked for, by the case's names; weights are loaded."""
    dtype = getattr(torch, case.spec["dtype"])
    module.to(dtype).load_state_dict(case.below("w"), strict=False)
    inputs = {name: t.clone().requires_grad_() for name, t in case.below("in").items()}
    named = inputs | {f"w/{name}": t for name, t in module.named_parameters()}
    wanted = {name.partition("/")[2] for name in case.expected if name.startswith("grad")}
    return inputs, {name: t for name, t in named.items() if name in wanted}


def arrays_of(left: Intermediates, suffix: str = "") -> dict[str, Tensor]:
    """The three arrays by the cases' names."""
    return {f"out/{name}{suffix}": t for name, t in zip(ARRAYS, left.to_tuple(), strict=True) if t is not None}


def graded(case: Case, got: dict[str, Tensor], named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results with the gradients that the case asks for."""
    if not named:
        return got
    cotangents = case.below("ct")
    loss = (got["out/out"] * cotangents["out"]).sum()
    grads = gradients(loss, named, "grad")
    for prefix, name in (("grad_s", "post_softmax"), ("grad_pre", "pre_softmax")):
        if any(expected.startswith(f"{prefix}/") for expected in case.expected):
            grads |= gradients(loss + (got[f"out/{name}"] * cotangents[name]).sum(), named, prefix)
    return got | grads


def attend(case: Case) -> dict[str, Tensor]:
    """A case of ``Attend``."""
    ctor, call, masks = dict(case.spec["ctor"]), case.spec["call"], case.below("mask")
    if "cope" in ctor:
        ctor["cope"] = CoPE(case.tensors["in/q"].shape[-1], ctor["heads"], **ctor["cope"])
    dropped = "aux/dropout_keep" in case.tensors
    module = Attend(**ctor, backend="eager" if dropped else "auto").train(call["training"])
    inputs, named = leaves(case, module)
    with injected(case):
        out, left = module(**inputs, **masks, causal=call["causal"])
    return graded(case, {"out/out": out, **({} if ctor.get("flash") else arrays_of(left))}, named)


RUNNERS: dict[str, Runner] = {"x_transformers.attend.Attend": attend}
