"""The feed-forward layer of x-transformers, with its gated variants."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.norms import LayerNorm
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.refusals import at_most_one, needs


def softclamp(x: Tensor, value: float) -> Tensor:
    """value * tanh(x / value).

    Example:
        >>> softclamp(torch.tensor(100.0), 2.0)
        tensor(2.)
    """
    return (x / value).tanh() * value


class ReluSquared(nn.Module):
    """max(x, 0)^2 (arXiv 2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x.relu() ** 2


class SoLU(nn.Module):
    """softmax(x) * x, normalised, over the last dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim]."""
        normed: Tensor = self.norm(x.softmax(-1) * x)
        return normed


class _Clamped(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return softclamp(x, self.value)


class GLU(nn.Module):
    """up * activation(gate), both linear maps of the input (arXiv 2002.05202)."""

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        activation: Callable[[Tensor], Tensor],
        mult_bias: bool = False,
        softclamp: bool = False,
        gate_softclamp_value: float = 4.0,
        up_softclamp_value: float = 25.0,
    ) -> None:
        super().__init__()
        needs(
            not softclamp or isinstance(activation, (nn.GELU, nn.SiLU)),
            "ff_glu_softclamp must come with a GELU or ff_swish",
            type(activation).__name__,
            "Leave the other activation out",
        )
        self.act = activation
        self.gate_softclamp_value = gate_softclamp_value if softclamp else None
        self.up_softclamp_value = up_softclamp_value if softclamp else None
        self.proj = nn.Linear(dim_in, dim_out * 2)
        self.mult_bias = constant(1.0, dim_out) if mult_bias else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim_in]."""
        up, gate = self.proj(x).chunk(2, -1)
        up = up if self.up_softclamp_value is None else softclamp(up, self.up_softclamp_value)
        return up * self._activated(gate) * self.mult_bias

    def _activated(self, gate: Tensor) -> Tensor:
        if self.gate_softclamp_value is None:
            return self.act(gate)
        share = torch.special.ndtr(gate) if isinstance(self.act, nn.GELU) else gate.sigmoid()
        return softclamp(gate, self.gate_softclamp_value) * share


class FeedForward(nn.Module):
    """Linear, activation, linear; see x-transformers' class of that name for the options.

    Example:
        >>> FeedForward(8, glu=True, swish=True)(torch.zeros(1, 3, 8)).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        mult: float = 4,
        glu: bool = False,
        glu_mult_bias: bool = False,
        swish: bool = False,
        relu_squared: bool = False,
        solu: bool = False,
        custom_activation: nn.Module | None = None,
        post_act_ln: bool = False,
        dropout: float = 0.0,
        sublayer_dropout: float = 0.0,
        no_bias: bool = False,
        zero_init_output: bool = False,
        output_proj_depth: int | None = None,
        softclamp_value: float | None = None,
        glu_softclamp: bool = False,
        glu_gate_softclamp_value: float = 4.0,
        glu_up_softclamp_value: float = 25.0,
    ) -> None:
        super().__init__()
        at_most_one(relu_squared=relu_squared, solu=solu)
        inner = int(dim * mult)
        if custom_activation is not None:
            activation: nn.Module = deepcopy(custom_activation)
        elif relu_squared:
            activation = ReluSquared()
        elif solu:
            activation = SoLU(inner)
        else:
            activation = nn.SiLU() if swish else nn.GELU()
        if glu:
            enter: nn.Module = GLU(dim, inner, activation, glu_mult_bias, glu_softclamp, glu_gate_softclamp_value, glu_up_softclamp_value)
        else:
            clamp = [] if softclamp_value is None else [_Clamped(softclamp_value)]
            enter = nn.Sequential(nn.Linear(dim, inner, bias=not no_bias), *clamp, activation)
        leave = nn.Linear(inner, dim_out or dim, bias=not no_bias)
        norm = [LayerNorm(inner)] if post_act_ln else []
        last = [nn.Dropout(sublayer_dropout)] if sublayer_dropout > 0 else []
        self.ff = nn.Sequential(enter, *norm, nn.Dropout(dropout), leave, *last)
        begin_output(leave, zero_init_output, output_proj_depth)

    def muon_parameters(self) -> list[Tensor]:
        """The weights of the linear maps."""
        return [m.weight for m in self.modules() if isinstance(m, nn.Linear)]

    def forward(self, x: Tensor, deep_embed: Tensor | None = None) -> Tensor:
        """x [batch, length, dim]; the output is multiplied by ``deep_embed``."""
        out: Tensor = self.ff(x)
        return out if deep_embed is None else out * deep_embed


def begin_output(projection: nn.Module, zero: bool, depth: int | None) -> None:
    """Starts the last linear map of a branch at zero, or smaller the deeper it stands."""
    linear = next((m for m in projection.modules() if isinstance(m, nn.Linear)), None)
    if linear is None:
        return
    if zero:
        nn.init.zeros_(linear.weight)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    elif depth is not None:
        nn.init.normal_(linear.weight, std=(2 * linear.in_features * depth) ** -0.5)
