"""From heads to the output of an attention layer: scales, gates by input, output and heads (arXiv 2306.12929), projection."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.nn.x_transformers.residuals import orthogonal


class LowRank(nn.Module):
    """up(activation(down(x))), zero at first."""

    def __init__(self, dim_in: int, dim_out: int, rank: int, activation: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        needs(rank < max(dim_in, dim_out), f"a gate's rank must be below its sizes {dim_in} or {dim_out}", repr(rank), "Lower it")
        self.down, self.up = nn.Linear(dim_in, rank, bias=False), nn.Linear(rank, dim_out, bias=False)
        nn.init.zeros_(self.up.weight)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim_in]."""
        hidden = self.down(x)
        result: Tensor = self.up(hidden if self.activation is None else self.activation(hidden))
        return result


def gate(dim_in: int, dim_out: int, rank: int | None, activation: Callable[[Tensor], Tensor] | None) -> nn.Module:
    """A linear map without bias that is zero at first, of low rank where one is given.

    Example:
        >>> gate(8, 4, None, None), type(gate(8, 4, 2, None)).__name__
        (Linear(in_features=8, out_features=4, bias=False), 'LowRank')
    """
    if rank is not None:
        return LowRank(dim_in, dim_out, rank, activation)
    linear = nn.Linear(dim_in, dim_out, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def by_heads(logits: Tensor, heads: int) -> Tensor:
    """Logits [batch, length, heads] or [batch, length, heads * dim] as [batch, length, heads, 1 or dim]."""
    parts: Tensor = logits.unflatten(-1, (heads, -1))
    return parts


class Finish(nn.Module):
    """What an attention layer has after its weighted values."""

    heads: int
    kv_heads: int
    head_scale_params: nn.Parameter | None
    to_v_gate: nn.Module | None
    to_output_gate: nn.Module | None
    to_v_gate_activation: Callable[[Tensor], Tensor]
    to_v_head_gate: nn.Linear | None
    orthogonal_parts: int
    to_out: nn.Module
    sublayer_dropout: nn.Dropout | None

    def _gates(
        self,
        dim: int,
        merged: int,
        by_input: tuple[bool, bool, int | None],
        by_output: tuple[bool, bool, int | None],
        activation: Callable[[Tensor], Tensor] | None,
    ) -> None:
        for name, (given, headwise, rank) in (("gate_values", by_input), ("output_gate", by_output)):
            needs(not headwise or rank is None, f"{name}_rank must be left out with {name}_headwise", repr(rank), "Choose one")
            size = self.heads if headwise else merged
            made = gate(dim if name == "gate_values" else merged, size, rank, activation) if given else None
            setattr(self, "to_v_gate" if name == "gate_values" else "to_output_gate", made)

    def _scaled(self, x: Tensor, out: Tensor) -> Tensor:
        """Each head [batch, heads, q_len, value_dim] by its own number and gate."""
        out = out if self.head_scale_params is None else out * self.head_scale_params
        if self.to_v_head_gate is None:
            return out
        share: Tensor = self.to_v_head_gate(x).sigmoid().transpose(1, 2)[..., None]
        return out * share

    def _finished(self, x: Tensor, out: Tensor, values: Tensor, o_delta: Tensor | None) -> Tensor:
        """From heads [batch, heads, q_len, value_dim] to the layer's output: gates, projection."""
        out = out.transpose(1, 2).flatten(2)
        out = out if o_delta is None else out + o_delta
        logits = [
            by_heads(made(given), self.heads) for made, given in ((self.to_v_gate, x), (self.to_output_gate, out)) if made is not None
        ]
        if logits:
            gated = by_heads(out, self.heads) * self.to_v_gate_activation(logits[0] if len(logits) == 1 else logits[0] + logits[1])
            out = gated.flatten(2)
        if self.orthogonal_parts:
            along = values.transpose(1, 2).flatten(2).repeat(1, 1, self.heads // self.kv_heads)
            out = torch.cat([orthogonal(out, along)] * self.orthogonal_parts, -1)
        out = self.to_out(out)
        return out if self.sublayer_dropout is None else self.sublayer_dropout(out)
