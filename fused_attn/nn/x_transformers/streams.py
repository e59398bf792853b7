"""Several streams past the layers, and views of all that layers saw: what a layer reads is mixed, what it gives is dealt out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from fused_attn.nn.x_transformers.gates import LowRank
from fused_attn.nn.x_transformers.norms import RMSNorm
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.nn.x_transformers.residuals import Joining


class _Streams(Joining):
    """Streams as [batch * streams, length, dim] outside, [batch, length, streams, dim] inside."""

    num_residual_streams: int

    def _apart(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(0, (-1, self.num_residual_streams))
        return parts.movedim(1, 2)

    def forward(self, x: Tensor, residual: Tensor, *, mask: Tensor | None = None, beta: Tensor | None = None) -> Tensor:
        """x [batch, length, dim], dealt out to the streams [batch, length, streams, dim] by beta [batch, length, streams]."""
        assert beta is not None
        return (x[..., None, :] * beta[..., None] + residual).movedim(2, 1).flatten(0, 1)


class HyperConnection(_Streams):
    """Streams that a layer reads with weights that depend on them, and is dealt out to likewise (arXiv 2409.19606)."""

    def __init__(self, dim: int, *, layer_index: int, num_residual_streams: int, num_input_views: int = 1, **_: Any) -> None:
        super().__init__()
        streams, views = num_residual_streams, num_input_views
        self.num_residual_streams, self.num_input_views = streams, views
        self.norm = nn.LayerNorm(dim, bias=False)
        self.static_beta = constant(1.0, streams)
        self.static_alpha = constant(0.0, streams, views + streams)
        with torch.no_grad():
            self.static_alpha[layer_index % streams, :views] = 1.0
            self.static_alpha[:, views:].fill_diagonal_(1.0)
        self.dynamic_alpha_fn = constant(0.0, dim, streams + views)
        self.dynamic_alpha_scale = constant(0.01)
        self.dynamic_beta_fn = constant(0.0, dim)
        self.dynamic_beta_scale = constant(0.01)

    def prepare(self, stream: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        streams, views = self._apart(stream), self.num_input_views
        normed = self.norm(streams)
        alpha = normed @ self.dynamic_alpha_fn * self.dynamic_alpha_scale + self.static_alpha
        # The package balances one row at a time, which leaves ones whatever the numbers are: every stream goes on from the sum of all.
        alpha = torch.cat((alpha[..., :views].sigmoid(), torch.ones_like(alpha[..., views:])), -1)
        beta = (normed @ self.dynamic_beta_fn).sigmoid() * 2 * self.dynamic_beta_scale + self.static_beta
        mixed = alpha.mT @ streams
        read = mixed[..., 0, :] if views == 1 else mixed[..., :views, :].movedim(2, 0)
        return read, mixed[..., views:, :], {"beta": beta.sigmoid() * 2}


class GatedMultiResidual(_Streams):
    """Streams that are read through a gate per element and written through a gate per stream, both of low rank."""

    def __init__(
        self,
        dim: int,
        *,
        layer_index: int,
        num_residual_streams: int,
        num_input_views: int = 1,
        read_gate_rank: int | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        streams, views = num_residual_streams, num_input_views
        self.num_residual_streams, self.num_input_views = streams, views
        needs(read_gate_rank is not None, "read_gate_rank must be given in residual_fn_kwargs", "None", "Pass the rank of the gates")
        rank = read_gate_rank or 0
        self.read_norm = nn.RMSNorm(dim, elementwise_affine=False)
        self.read_gain = constant(1.0, streams, dim)
        self.static_read_logit = constant(0.0, views, streams, dim)
        with torch.no_grad():
            self.static_read_logit[:, layer_index % streams] = 1.0
        self.static_write_logit = constant(0.0, streams)
        self.to_bottleneck = nn.Linear(dim * streams, rank, bias=False)
        self.to_read_gate = nn.Linear(rank, dim * streams * views, bias=False)
        self.to_write_gate = nn.Linear(rank, streams, bias=False)
        for layer in (self.to_read_gate, self.to_write_gate):
            nn.init.zeros_(layer.weight)
        self.dynamic_gate_scale = constant(0.01)

    def prepare(self, stream: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        streams, count = self._apart(stream), self.num_residual_streams
        normed = self.read_norm(streams) * self.read_gain
        dynamic = silu(self.to_bottleneck(normed.flatten(-2) / count)) * self.dynamic_gate_scale
        gates = (self.to_read_gate(dynamic) + self.static_read_logit.flatten()).sigmoid()
        gates = gates.unflatten(-1, (self.num_input_views, count, -1)).movedim(2, 0)  # [views, batch, length, streams, dim]
        read = (gates * normed).sum(-2) / count
        beta = (self.to_write_gate(dynamic) + self.static_write_logit).sigmoid() * 2
        return read[0] if self.num_input_views == 1 else read, streams, {"beta": beta}


class AttentionResidual(nn.Module):
    """What a layer reads is attended to among all that layers saw before, the latest as the query (arXiv 2603.15031)."""

    def __init__(self, dim: int, num_views: int = 1, lora_rank: int | None = None, lora_activation: Any = None, **_: Any) -> None:
        super().__init__()
        rank = 64 if lora_rank is None else lora_rank
        needs(rank < dim, f"lora_rank must be below dim = {dim}", repr(rank), "Lower it in attn_aggregated_residual_kwargs")
        self.scale: float = dim**-0.5
        self.num_views = num_views
        self.to_keys = nn.RMSNorm(dim)
        self.to_query = nn.Sequential(nn.RMSNorm(dim), LowRank(dim, dim * num_views, rank, lora_activation))
        self.norm = nn.RMSNorm(dim)

    def forward(self, x: Tensor, hiddens: list[Tensor]) -> Tensor:
        """[batch, length, dim], or [views, ...], from all that layers saw, x the last of it."""
        past = torch.stack(hiddens)
        latest = past[-1]
        delta = self.to_query(latest).unflatten(-1, (self.num_views, -1)).movedim(-2, 0)
        query = self.norm(latest + delta)
        scores = torch.einsum("v...d,l...d->vl...", query, self.to_keys(past)) * self.scale
        read = torch.einsum("vl...,l...d->v...d", scores.softmax(1), past)
        return read[0] if self.num_views == 1 else read


class DynamicLIMe(nn.Module):
    """What a layer reads is a sum of all that layers saw before, with weights that depend on the latest (arXiv 2502.09245)."""

    def __init__(self, dim: int, num_layers: int, num_views: int = 1, use_softmax: bool = True) -> None:
        super().__init__()
        self.num_views, self.use_softmax = num_views, use_softmax
        self.to_weights = nn.Sequential(RMSNorm(dim), nn.Linear(dim, num_views * num_layers))

    def forward(self, x: Tensor, hiddens: list[Tensor]) -> Tensor:
        """[batch, length, dim], or [views, ...], from all that layers saw, x the last of it."""
        logits = self.to_weights(x).unflatten(-1, (self.num_views, -1))
        weights = logits.softmax(-1) if self.use_softmax else logits.relu()
        read = torch.einsum("lbnd,bnvl->vbnd", torch.stack(hiddens), weights)
        return read[0] if self.num_views == 1 else read
