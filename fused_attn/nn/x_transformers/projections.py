"""From inputs to queries, keys and values by heads: projections, norms, positions, and keys in front."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_attn.nn.x_transformers.intermediates import Intermediates
from fused_attn.nn.x_transformers.norms import MultiheadRMSNorm
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.nn.x_transformers.rotary import Rotation, inverse, polar, rotated


class Projections(nn.Module):
    """What an attention layer has before its scores."""

    heads: int
    kv_heads: int
    dim_head: int
    value_dim: int
    num_mem_kv: int
    qkv_receive_diff_residuals: bool
    rotate_num_heads: int
    scale: float
    mem_k: nn.Parameter
    mem_v: nn.Parameter
    q_rmsnorm: MultiheadRMSNorm | None
    k_rmsnorm: MultiheadRMSNorm | None
    value_rmsnorm: MultiheadRMSNorm | None
    to_value_residual_mix: nn.Sequential | None

    def _latents(self, dim: int, dim_kv: int, latents: tuple[bool, int | None, bool, int | None], subheads: int | None) -> None:
        """The projections to queries, keys and values, through low-rank latents where asked for (arXiv 2405.04434)."""
        use_q, dim_q, self.use_latent_kv, dim_latent_kv = latents
        needs(not use_q or dim_q is not None, "dim_latent_q must be given with use_latent_q", "None", "Pass its size")
        needs(
            not self.use_latent_kv or dim_latent_kv is not None, "dim_latent_kv must be given with use_latent_kv", "None", "Pass its size"
        )
        self.to_latent_q = nn.Linear(dim, dim_q or dim, bias=False) if use_q else None
        self.to_latent_kv = nn.Linear(dim_kv, dim_latent_kv or dim_kv, bias=False) if self.use_latent_kv else None
        self.to_rotateable_k = None if subheads is None else nn.Linear(dim, self.dim_head * subheads, bias=False)
        into = (dim_latent_kv if self.use_latent_kv else None) or dim_kv
        self.to_q = nn.Linear((dim_q if use_q else None) or dim, self.dim_head * self.heads, bias=False)
        self.to_k = nn.Linear(into, self.dim_head * (self.kv_heads - (subheads or 0)), bias=False)
        self.to_v = nn.Linear(into, self.value_dim * self.kv_heads, bias=False)

    def _norms(self, qk_norm: bool, groups: int, scale: float, dim_scale: bool) -> float:
        """Cosine similarity's parts; the factor of the scores."""
        self.qk_norm, self.qk_norm_groups = qk_norm, groups
        self.qk_norm_q_scale: nn.Parameter | int = 1
        self.qk_norm_k_scale: nn.Parameter | int = 1
        if not qk_norm:
            return self.scale
        size = self.dim_head // groups
        needs(self.dim_head % groups == 0, f"qk_norm_groups must divide dim_head = {self.dim_head}", repr(groups), "Choose a divisor")
        needs(size > 2, "a group of qk_norm must have more than 2 elements", repr(size), "Use fewer groups")
        if not dim_scale:
            return scale
        self.qk_norm_q_scale = constant(self.dim_head**0.25, self.heads, 1, self.dim_head)
        self.qk_norm_k_scale = constant(self.dim_head**0.25, self.kv_heads, 1, self.dim_head)
        return self.scale

    def _projected(
        self, inputs: tuple[Tensor, ...], deltas: tuple[Tensor | None, ...], cache: Intermediates | None
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor | None] | None]:
        """Queries, keys and values by heads, and what a cache keeps where they come from latents."""
        cached, subheads = None, None
        q_input, source, values = inputs
        if self.to_latent_kv is not None:
            subheads = None if self.to_rotateable_k is None else _by_heads(self.to_rotateable_k(source), self.dim_head)
            source = self.to_latent_kv(source)
            if cache is not None and cache.cached_kv is not None:
                source = torch.cat((cache.cached_kv[0], source), -2)
                before = cache.cached_kv[1]
                subheads = subheads if subheads is None or before is None else torch.cat((before, subheads), -2)
            values, cached = source, (source, subheads)
        q, k, v = (
            projected if delta is None else projected + delta
            for projected, delta in zip((self.to_q(q_input), self.to_k(source), self.to_v(values)), deltas, strict=True)
        )
        k = _by_heads(k, self.dim_head)
        return (
            _by_heads(q, self.dim_head),
            k if subheads is None else torch.cat((k, subheads), 1),
            _by_heads(v, self.value_dim),
            cached,
        )

    def _streams(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What queries, keys and values are made of."""
        if not self.qkv_receive_diff_residuals:
            return x, *(x if context is None else context,) * 2
        needs(context is None, "context must be None with qkv_receive_diff_residuals", "a tensor", "Choose one")
        needs(not self.use_latent_kv, "use_latent_kv must be off with qkv_receive_diff_residuals", "both", "Choose one")
        needs(
            x.dim() == 4 and x.shape[0] == 3,
            "x must be [3, batch, length, dim] with qkv_receive_diff_residuals",
            repr(list(x.shape)),
            "Stack three",
        )
        q_input, k_input, v_input = x.unbind(0)
        return q_input, k_input, v_input

    def _mix(self, q_input: Tensor) -> Tensor:
        """How much of a layer's own values counts, [batch, heads, q_len, 1]."""
        if self.to_value_residual_mix is None:
            return torch.full((), 0.5, device=q_input.device)
        mix: Tensor = self.to_value_residual_mix(q_input)
        return mix.transpose(1, 2)[..., None]

    def _normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qk_norm:
            q, k = self._unit(q) * self.qk_norm_q_scale, self._unit(k) * self.qk_norm_k_scale
        q = q if self.q_rmsnorm is None else self.q_rmsnorm(q)
        k = k if self.k_rmsnorm is None else self.k_rmsnorm(k)
        return q, k, v if self.value_rmsnorm is None else self.value_rmsnorm(v)

    def _unit(self, x: Tensor) -> Tensor:
        """Groups of each vector at length 1."""
        groups: Tensor = x.unflatten(-1, (self.qk_norm_groups, -1))
        return nn.functional.normalize(groups, dim=-1).flatten(-2)

    def _positioned(
        self, q: Tensor, k: Tensor, rotary: Rotation | None, of_keys: Rotation | None, phases: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        if rotary is not None:
            needs(of_keys is not None, "context_rotary_pos_emb must be given with a context", "None", "Pass the context's angles")
            assert of_keys is not None
            still = self.heads - self.rotate_num_heads
            turned = [
                rotated(part[:, still:], angles, scale)
                for part, angles, scale in ((q, rotary[0], 1.0 if rotary[1] is None else rotary[1]), (k, of_keys[0], inverse(of_keys[1])))
            ]
            q, k = (torch.cat((t[:, :still], new), 1) if still else new for t, new in zip((q, k), turned, strict=True))
        if phases is not None:
            q, k = polar(q, phases[0]), polar(k, phases[0] + phases[1])
        return q, k

    def _with_memories(self, k: Tensor, v: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Learned keys and values in front."""
        if not self.num_mem_kv:
            return k, v, keys
        mem_k = self._unit(self.mem_k) * self.qk_norm_k_scale if self.qk_norm else self.mem_k
        k, v = (torch.cat((m.to(t.dtype).expand(t.shape[0], -1, -1, -1), t), -2) for m, t in ((mem_k, k), (self.mem_v, v)))
        return k, v, None if keys is None else nn.functional.pad(keys, (self.num_mem_kv, 0), value=True)

    def _with_additional(
        self, k: Tensor, v: Tensor, keys: Tensor | None, added: tuple[Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A call's own keys and values in front; where they have another number of heads, all are repeated to the queries'."""
        if added is None:
            return k, v, keys
        pairs = [(added[0], k), (added[1], v)]
        if added[0].shape[1] != self.kv_heads:
            needs(self.heads % added[0].shape[1] == 0, f"additional heads must divide {self.heads}", repr(added[0].shape[1]), "Repeat them")
            pairs = [(a.repeat(1, self.heads // a.shape[1], 1, 1), t.repeat(1, self.heads // t.shape[1], 1, 1)) for a, t in pairs]
        front, length = added[0].shape[2], k.shape[2]
        k, v = (torch.cat(pair, -2) for pair in pairs)
        if mask is None:
            return k, v, None if keys is None else nn.functional.pad(keys, (front, 0), value=True)
        return k, v, nn.functional.pad(mask, (0, length), value=True) if keys is None else torch.cat((mask, keys), -1)


def _by_heads(x: Tensor, dim: int) -> Tensor:
    """[batch, length, heads * dim] as [batch, heads, length, dim]."""
    parts: Tensor = x.unflatten(-1, (-1, dim))
    return parts.transpose(1, 2)
