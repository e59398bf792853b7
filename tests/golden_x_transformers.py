"""Runs this package's layers on the golden cases of their namesakes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from fused_attn.backends import eager
from fused_attn.nn import x_transformers as xt
from fused_attn.nn.x_transformers import Attend, CoPE, Intermediates, dense
from tests.golden_cases import Case, Runner, gradients

ARRAYS = ("qk_similarities", "pre_softmax", "post_softmax")


def noise(case: Case, word: str) -> list[Tensor]:
    """The case's tensors of some randomness, in the order of the layers that draw it."""
    return [t for name, t in sorted(case.below("aux").items()) if word in name]


@contextmanager
def injected(case: Case) -> Iterator[None]:
    """Noise and removed weights as the case has them, where this package draws its own."""
    gumbels, keeps, draw = iter(noise(case, "gumbel")), iter(noise(case, "dropout_keep")), torch.Tensor.exponential_

    def exponential(tensor: Tensor, *args: Any) -> Tensor:
        gumbel = next(gumbels, None)
        return draw(tensor, *args) if gumbel is None else tensor.copy_((-gumbel).exp())

    def keep(dropout: Any, grid: Any, dtype: torch.dtype) -> Tensor:
        return next(keeps).to(dtype) / (1 - dropout.p)

    with (
        patch.object(torch.Tensor, "exponential_", exponential),
        patch.object(eager, "keep_factor", keep),
        patch.object(dense, "keep_factor", keep),
    ):
        yield


def built(cls: Any, case: Case, **more: Any) -> tuple[Any, dict[str, Any]]:
    """The module, in the case's mode, and the other arguments of its call; what is injected is known to eager alone."""
    call = dict(case.spec["call"])
    backend = "eager" if noise(case, "dropout_keep") else "auto"
    module = cls(**{**case.spec["ctor"], **more}, backend=backend).train(bool(call.pop("training", False)))
    return module, call


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
    ctor = case.spec["ctor"]
    cope = {"cope": CoPE(case.tensors["in/q"].shape[-1], ctor["heads"], **ctor["cope"])} if ctor.get("cope") else {}
    module, call = built(Attend, case, **cope)
    inputs, named = leaves(case, module)
    with injected(case):
        out, left = module(**inputs, **case.below("mask"), **call)
    return graded(case, {"out/out": out, **({} if ctor.get("flash") else arrays_of(left))}, named)


def biases(case: Case) -> Iterator[torch.nn.Module | None]:
    """What may be the bias by distance that a case of ``Attention`` has beside the layer: cases hold its tensors, and not its options."""
    ctor, given = case.spec["ctor"], {**case.below("w"), **case.below("buf")}
    if "rel_pos.slopes" in given:
        yield xt.AlibiPositionalBias(len(given["rel_pos.slopes"]), ctor["heads"])
    elif "rel_pos.relative_attention_bias.weight" in given:
        buckets, heads = given["rel_pos.relative_attention_bias.weight"].shape
        for distance in (128, 8, 16, 32, 64):
            yield xt.RelativePositionBias(ctor["dim_head"] ** 0.5, ctor.get("causal", False), buckets, distance, heads)
    elif "rel_pos.mlp.0.0.weight" in given:
        depth, dim = sum(name.endswith(".0.weight") for name in given), len(given["rel_pos.mlp.0.0.weight"])
        for log_distance in (False, True):
            yield xt.DynamicPositionBias(dim, heads=ctor["heads"], depth=depth, log_distance=log_distance)
    else:
        yield None


def attention(case: Case) -> dict[str, Tensor]:
    """A case of ``Attention``, with the first bias by distance that gives the case's results."""
    got: dict[str, Tensor] = {}
    for rel_pos in biases(case):
        got = attention_with(case, rel_pos)
        if torch.allclose(got["out/out"], case.tensors["out/out"], **case.tolerance("out/out")):
            break
    return got


def attention_with(case: Case, rel_pos: torch.nn.Module | None) -> dict[str, Tensor]:
    """A case of ``Attention`` with a bias by distance."""
    module, more = built(xt.Attention, case)
    if rel_pos is not None:
        module.add_module("rel_pos", rel_pos)
        more["rel_pos"] = rel_pos
    inputs, named = leaves(case, module)
    if "rotary.inv_freq" in case.below("buf"):
        rotary = xt.RotaryEmbedding(2 * len(case.tensors["buf/rotary.inv_freq"])).to(inputs["x"].dtype)
        more["rotary_pos_emb"] = rotary.forward_from_seq_len(inputs["x"].shape[1])
    with injected(case):
        out, left = module(**inputs, **case.below("mask"), **more, return_intermediates=True)
    return graded(case, {"out/out": out, **arrays_of(left)}, named)


def stack(case: Case) -> dict[str, Tensor]:
    """A case of a stack of layers, whose class has the target's name."""
    name = case.spec["target"].rpartition(".")[2]
    module, call = built(getattr(xt, name), case)
    if name == "PrefixDecoder" and "prefix_attn_len" not in call:  # the first query sees the prefix and itself
        seen = case.tensors["out/pre_softmax.0"][:, 0, 0] > torch.finfo(torch.float32).min
        call["prefix_attn_len"] = seen.sum(-1)
    inputs, named = leaves(case, module)
    with injected(case):
        out, left = module(**inputs, **case.below("mask"), **call, return_hiddens=True)
    arrays: dict[str, Tensor] = {}
    for place, of_layer in enumerate(left.attn_intermediates):
        arrays |= arrays_of(of_layer, f".{place}")
    return graded(case, {"out/out": out, **arrays}, named)


STACKS = ("AttentionLayers", "Encoder", "Decoder", "PrefixDecoder", "CrossAttender")
RUNNERS: dict[str, Runner] = {
    "x_transformers.attend.Attend": attend,
    "x_transformers.Attention": attention,
    **{f"x_transformers.{name}": stack for name in STACKS},
}
