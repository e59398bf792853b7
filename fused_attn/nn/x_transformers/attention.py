"""x-transformers' ``Attention``: projections, norms, positions, memories and gates around ``Attend``, with its names in the state dict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.lowering import Grid
from fused_attn.masks import Mask
from fused_attn.nn.x_transformers.attend import Attend
from fused_attn.nn.x_transformers.cope import CoPE
from fused_attn.nn.x_transformers.feedforward import begin_output, softclamp
from fused_attn.nn.x_transformers.forgetting import DataDependentAlibi, PerRowDataDependentAlibi
from fused_attn.nn.x_transformers.gates import Finish
from fused_attn.nn.x_transformers.hybrid import Hybrid
from fused_attn.nn.x_transformers.intermediates import Intermediates
from fused_attn.nn.x_transformers.norms import MultiheadRMSNorm
from fused_attn.nn.x_transformers.pairs import Pairs, before_keys, keys_of_call
from fused_attn.nn.x_transformers.parameters import constant, normal
from fused_attn.nn.x_transformers.positions import AlibiPositionalBias, PositionBias, RelativeProjPositionalBias
from fused_attn.nn.x_transformers.projections import Projections
from fused_attn.nn.x_transformers.refusals import needs
from fused_attn.nn.x_transformers.rotary import Rotation
from fused_attn.score_mods import Bias, ScoreMod


class Attention(Projections, Hybrid, Finish):
    """Multi-head attention with x-transformers' options, which its README explains; ``docs/migrating.md`` says which are left out.

    Memory is O(length) but for what ``Attend`` lists, ``data_dependent_alibi_per_row``, a bidirectional ``data_dependent_alibi``, and biases
    that are arrays.

    Raises:
        AssertionError: options exclude each other, as in the package.
        NotImplementedError: an option that is left out.

    Example:
        >>> layer = Attention(32, dim_head=8, heads=4, kv_heads=2, causal=True, qk_norm=True)
        >>> layer(torch.randn(1, 5, 32)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        dim_context: int | None = None,
        heads: int = 8,
        causal: bool = False,
        flash: bool = False,
        pre_talking_heads: bool = False,
        post_talking_heads: bool = False,
        pre_scale_post_talking_heads: bool = False,
        head_scale: bool = False,
        sparse_topk: int | None = None,
        sparse_topk_straight_through: bool = False,
        num_mem_kv: int = 0,
        dropout: float = 0.0,
        sublayer_dropout: float = 0.0,
        on_attn: bool = False,
        gate_value_heads: bool = False,
        swiglu_values: bool = False,
        gate_values: bool = False,
        gate_values_rank: int | None = None,
        gate_values_headwise: bool = False,
        output_gate: bool = False,
        output_gate_rank: int | None = None,
        output_gate_headwise: bool = False,
        low_rank_silu_gates: bool = True,
        zero_init_output: bool = False,
        output_proj_depth: int | None = None,
        hard: bool = False,
        max_attend_past: int | None = None,
        qk_norm: bool = False,
        qk_norm_groups: int = 1,
        qk_norm_scale: float = 10,
        qk_norm_dim_scale: bool = False,
        qk_rmsnorm: bool = False,
        k_rmsnorm: bool = False,
        value_rmsnorm: bool = False,
        l2_distance: bool = False,
        sigmoid: bool = False,
        gumbel_softmax: bool = False,
        gumbel_softmax_temp: float = 1.0,
        gumbel_softmax_hard: bool = True,
        selective: bool = False,
        cog_signed: bool = False,
        custom_attn_fn: Callable[[Tensor], Tensor] | None = None,
        hybrid_module: nn.Module | None = None,
        hybrid_mask_kwarg: str | None = None,
        hybrid_fold_axial_dim: int | None = None,
        hybrid_learned_mix: bool = False,
        one_kv_head: bool = False,
        kv_heads: int | None = None,
        value_dim_head: int | None = None,
        dim_out: int | None = None,
        add_zero_kv: bool = False,
        head_learned_sink: bool = False,
        rotate_num_heads: int | None = None,
        data_dependent_alibi: bool = False,
        data_dependent_alibi_per_row: bool = False,
        data_dependent_alibi_per_row_dim_head: int = 8,
        data_dependent_alibi_kwargs: dict[str, Any] | None = None,
        use_rel_proj_pos_bias: bool = False,
        rel_proj_num_distance_basis: int = 16,
        rel_proj_max_dist: int = 1024,
        use_cope: bool = False,
        cope_max_pos: int = 16,
        cope_soft_onehot_pos: bool = False,
        cope_talking_heads: bool = False,
        softclamp_logits: bool = False,
        logit_softclamp_value: float = 50.0,
        learned_value_residual_mix: bool = False,
        orthog_projected_values: bool = False,
        orthog_projected_values_per_head: bool = False,
        laser: bool = False,
        laser_softclamp_value: float = 15.0,
        qkv_receive_diff_residuals: bool = False,
        project_out: bool | None = None,
        use_latent_q: bool = False,
        dim_latent_q: int | None = None,
        use_latent_kv: bool = False,
        dim_latent_kv: int | None = None,
        latent_rope_subheads: int | None = None,
        onnxable: bool = False,
        inverted_attention: bool = False,
        attend_sdp_kwargs: dict[str, bool] | None = None,
        flash_pack_seq: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.qkv_receive_diff_residuals = qkv_receive_diff_residuals
        needs(
            kv_heads is None or not one_kv_head, "one_kv_head and kv_heads must not be given together", "both", "one_kv_head is kv_heads=1"
        )
        kv_heads = 1 if one_kv_head else heads if kv_heads is None else kv_heads
        needs(heads % kv_heads == 0, f"kv_heads must divide heads = {heads}", repr(kv_heads), "Choose a divisor")
        value_dim = value_dim_head or dim_head
        self.heads, self.kv_heads, self.dim_head, self.value_dim = heads, kv_heads, dim_head, value_dim
        self.causal, self.max_attend_past, self.num_mem_kv = causal, max_attend_past, num_mem_kv
        self._beside(hybrid_module, (None if causal else hybrid_mask_kwarg, hybrid_fold_axial_dim, hybrid_learned_mix), (dim, value_dim))
        self.can_cache_kv = not (selective or data_dependent_alibi)
        self.scale = dim_head**-0.5
        merged = value_dim * heads

        self._latents(dim, dim_context or dim, (use_latent_q, dim_latent_q, use_latent_kv, dim_latent_kv), latent_rope_subheads)
        needs(
            latent_rope_subheads is None or rotate_num_heads is None,
            "rotate_num_heads must be left out with latent_rope_subheads",
            repr(rotate_num_heads),
            "The subheads are what is rotated",
        )
        rotate_num_heads = latent_rope_subheads or (heads if rotate_num_heads is None else rotate_num_heads)
        needs(0 < rotate_num_heads <= heads, f"rotate_num_heads must be in [1, {heads}]", repr(rotate_num_heads), "Count heads")
        needs(
            rotate_num_heads == heads or kv_heads == heads,
            "rotate_num_heads must be all heads with kv_heads",
            f"rotate_num_heads={rotate_num_heads}, kv_heads={kv_heads}",
            "Leave one of them out",
        )
        self.rotate_num_heads = rotate_num_heads

        self.laser, self.laser_softclamp_value = laser, laser_softclamp_value
        self._gates(dim, merged, (gate_values, gate_values_headwise, gate_values_rank), (output_gate, output_gate_headwise, output_gate_rank),
                    nn.functional.silu if low_rank_silu_gates else None)  # fmt: skip
        self.to_v_gate_activation = nn.functional.silu if swiglu_values else torch.sigmoid
        self.to_v_head_gate = nn.Linear(dim, heads) if gate_value_heads else None
        if self.to_v_head_gate is not None:
            nn.init.zeros_(self.to_v_head_gate.weight)
            nn.init.constant_(self.to_v_head_gate.bias, 10.0)

        logit_scale = self._norms(qk_norm, qk_norm_groups, qk_norm_scale, qk_norm_dim_scale)
        needs(not (qk_rmsnorm and k_rmsnorm), "qk_rmsnorm and k_rmsnorm must not be given together", "both", "qk_rmsnorm has both")
        self.q_rmsnorm = MultiheadRMSNorm(dim_head, heads) if qk_rmsnorm else None
        self.k_rmsnorm = MultiheadRMSNorm(dim_head, kv_heads) if qk_rmsnorm or k_rmsnorm else None
        self.value_rmsnorm = MultiheadRMSNorm(value_dim, kv_heads) if value_rmsnorm else None

        cope = None
        if use_cope:
            needs(causal, "use_cope must come with causal", "causal=False", "Pass causal=True")
            needs(not flash, "use_cope must come without flash", "flash=True", "Leave flash out")
            cope = CoPE(dim_head, heads, cope_max_pos, cope_soft_onehot_pos, cope_talking_heads)
        self.data_dependent_alibi: DataDependentAlibi | PerRowDataDependentAlibi | None = None
        if data_dependent_alibi:
            more = data_dependent_alibi_kwargs or {}
            per_row, size = data_dependent_alibi_per_row, data_dependent_alibi_per_row_dim_head
            self.data_dependent_alibi = (
                PerRowDataDependentAlibi(dim, heads, causal, size, **more) if per_row else DataDependentAlibi(dim, heads, causal, **more)
            )
        self.rel_proj_pos_bias = (
            RelativeProjPositionalBias(dim, heads, rel_proj_num_distance_basis, rel_proj_max_dist) if use_rel_proj_pos_bias else None
        )
        self.attend = Attend(
            dropout=dropout, causal=causal, heads=heads, pre_talking_heads=pre_talking_heads, post_talking_heads=post_talking_heads,
            pre_scale_post_talking_heads=pre_scale_post_talking_heads, sparse_topk=sparse_topk,
            sparse_topk_straight_through=sparse_topk_straight_through, scale=logit_scale, qk_norm=qk_norm, l2_distance=l2_distance,
            sigmoid=sigmoid, gumbel_softmax=gumbel_softmax, gumbel_softmax_temp=gumbel_softmax_temp, gumbel_softmax_hard=gumbel_softmax_hard,
            cog_signed=cog_signed, custom_attn_fn=custom_attn_fn, flash=flash, softclamp_logits=softclamp_logits,
            logit_softclamp_value=logit_softclamp_value, add_zero_kv=add_zero_kv, head_learned_sink=head_learned_sink, selective=selective,
            hard=hard, cope=cope, onnxable=onnxable, inverted_attention=inverted_attention, sdp_kwargs=attend_sdp_kwargs,
            flash_pack_seq=flash_pack_seq, backend=backend,
        )  # fmt: skip
        self.head_scale_params = constant(1.0, 1, heads, 1, 1) if head_scale else None
        if num_mem_kv > 0:
            self.mem_k, self.mem_v = normal(kv_heads, num_mem_kv, dim_head), normal(kv_heads, num_mem_kv, value_dim)
        self.to_value_residual_mix = nn.Sequential(nn.Linear(dim, heads), nn.Sigmoid()) if learned_value_residual_mix else None
        self.orthogonal_parts = int(orthog_projected_values) + int(orthog_projected_values_per_head)
        merged *= max(1, self.orthogonal_parts)
        out = dim_out or dim
        if project_out is None:
            project_out = heads > 1 or dim != out or on_attn
        wide = nn.Linear(merged, out * 2 if on_attn else out, bias=False)
        self.to_out: nn.Module = nn.Identity()
        if project_out:
            self.to_out = nn.Sequential(wide, nn.GLU()) if on_attn else wide
        begin_output(self.to_out, zero_init_output, output_proj_depth)
        self.sublayer_dropout = nn.Dropout(sublayer_dropout) if sublayer_dropout > 0 else None

    @torch.no_grad()
    def qk_clip_(self, pre_softmax_attn: Tensor | Intermediates, tau: float = 100) -> None:
        """Shrinks the weights of queries and keys of heads whose largest score exceeds ``tau`` (MuonClip)."""
        scores = pre_softmax_attn if isinstance(pre_softmax_attn, Tensor) else pre_softmax_attn.pre_softmax_attn
        needs(self.kv_heads == self.heads, "qk_clip_ needs a key head for every query head", f"kv_heads={self.kv_heads}", "Clip by hand")
        factors = (tau / scores.amax((0, 2, 3)).clamp(min=tau)).sqrt().repeat_interleave(self.dim_head)[:, None]
        self.to_q.weight.mul_(factors)
        self.to_k.weight.mul_(factors)

    def muon_parameters(self) -> list[Tensor]:
        """The parameters of values and output."""
        return [*self.to_v.parameters(), *self.to_out.parameters()]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        attn_mask: Tensor | Mask | None = None,
        rel_pos: nn.Module | None = None,
        attn_bias: Tensor | None = None,
        rotary_pos_emb: Rotation | None = None,
        context_rotary_pos_emb: Rotation | None = None,
        polar_pos_emb: tuple[Tensor, Tensor] | None = None,
        pos: Tensor | None = None,
        prev_attn: Tensor | None = None,
        mem: Tensor | None = None,
        mem_mask: Tensor | None = None,
        return_intermediates: bool = False,
        cache: Intermediates | None = None,
        value_residual: Tensor | None = None,
        additional_key_values: tuple[Tensor, Tensor] | None = None,
        additional_key_value_mask: Tensor | None = None,
        kv_input_residual: Tensor | None = None,
        q_delta: Tensor | None = None,
        k_delta: Tensor | None = None,
        v_delta: Tensor | None = None,
        o_delta: Tensor | None = None,
        attn_delta: Tensor | None = None,
        flash_pack_seq_kwargs: dict[str, Any] | None = None,
        causal: bool | None = None,
    ) -> Tensor | tuple[Tensor, Intermediates]:
        """Attends from x to itself or to a context.

        Args:
            x: [batch, q_len, dim]; with ``qkv_receive_diff_residuals`` [3, batch, q_len, dim], of queries, keys and values.
            context: [batch, kv_len, dim_context], whose keys count instead of x's.
            mask: bool [batch, q_len]: rows that come out as zeros where False, and keys of self-attention.
            context_mask: bool [batch, kv_len] of the keys, instead of ``mask``.
            attn_mask: bool [q_len, kv_len], [heads, q_len, kv_len] or [batch, heads, q_len, kv_len], or a mask of this package.
            rel_pos: a bias by distance, a module of lengths (q_len, kv_len).
            attn_bias: float, broadcastable to the scores.
            rotary_pos_emb: angles and scale of ``RotaryEmbedding``.
            context_rotary_pos_emb: those of the context.
            polar_pos_emb: angles and phases of ``PolarEmbedding``.
            pos: positions for ALiBi.
            prev_attn: scores of the layer before (RealFormer).
            mem: [batch, mem_len, dim] before the keys.
            mem_mask: bool [batch, mem_len].
            return_intermediates: whether to give ``Intermediates`` too.
            cache: those of the positions before.
            value_residual: values [batch, kv_heads, q_len, dim] mixed into this layer's.
            additional_key_values: keys and values [batch, heads, n, dim] in front.
            additional_key_value_mask: bool [batch, n].
            kv_input_residual: added to what keys and values are made of.
            q_delta: added to the projected queries; ``k_delta``, ``v_delta`` and ``o_delta`` likewise.
            k_delta: see q_delta.
            v_delta: see q_delta.
            o_delta: added before the output's projection.
            attn_delta: added to the weights.
            flash_pack_seq_kwargs: must be None.
            causal: instead of the constructor's.

        Returns:
            out [batch, q_len, dim_out], or (out, Intermediates).
        """
        x, *sources = self._streams(x, context)
        sources = sources if kv_input_residual is None else [t + kv_input_residual for t in sources]
        mem_len = 0 if mem is None else mem.shape[1]
        sources = sources if mem is None else [torch.cat((mem, t), 1) for t in sources]
        q_input = x if self.to_latent_q is None else self.to_latent_q(x)
        q, k, v, cached = self._projected((q_input, *sources), (q_delta, k_delta, v_delta), cache)
        values = v
        if value_residual is not None:
            v = torch.lerp(value_residual, v, self._mix(q_input).to(v.dtype))
        q, k, v = self._normed(q, k, v)
        if not self.use_latent_kv:
            before = (None, None) if cache is None or cache.cached_kv is None else cache.cached_kv
            k, v = _continued(k, before[0], mem_len), _continued(v, before[1], mem_len)
            cached = (k[..., mem_len:, :], v[..., mem_len:, :])
        q, k = self._positioned(q, k, rotary_pos_emb, context_rotary_pos_emb if context is not None else rotary_pos_emb, polar_pos_emb)
        keys = keys_of_call((mask, context_mask, mem_mask), context is not None, mem_len, x.shape[1])
        lengths = (q.shape[2], k.shape[2])
        k, v, keys = self._with_memories(k, v, keys)
        k, v, keys = self._with_additional(k, v, keys, additional_key_values, additional_key_value_mask)
        grid = Grid((*q.shape[:3], k.shape[2]), x.device, k.shape[2] - q.shape[2])
        is_causal = self.causal if causal is None else causal
        pairs = Pairs(grid, k.shape[2] - lengths[1], keys, attn_mask, self.max_attend_past, is_causal)
        bias = self._biases(x, q_input, lengths, k.shape[2], attn_bias, (rel_pos, pos))
        v = softclamp(v, self.laser_softclamp_value).exp() if self.laser else v
        out, left = self.attend(
            q, k, v, pairs.mask(), bias, prev_attn, attn_delta, mask, flash_pack_seq_kwargs, causal
        )  # fmt: skip
        out = out.clamp(min=1e-20).log() if self.laser else out
        left.values = values
        out = self._with_hybrid(x, self._scaled(x, out), mask, cache, left)
        out = self._finished(x, out, values, o_delta)
        if mask is not None and cache is None:
            out = out.masked_fill(~mask[..., None], 0.0)
        if not return_intermediates:
            return out
        left.cached_kv = cached
        return out, left

    def _biases(
        self,
        x: Tensor,
        q_input: Tensor,
        lengths: tuple[int, int],
        kv_len: int,
        attn_bias: Tensor | None,
        relative: tuple[nn.Module | None, Tensor | None],
    ) -> tuple[ScoreMod, ...]:
        """What is added to the scores over ``kv_len`` keys, of which those in front have no position."""
        front = kv_len - lengths[1]
        rel_pos, pos = relative
        needs(rel_pos is None or attn_bias is None, "attn_bias must be None with rel_pos", "both", "Add them up in attn_bias")
        found: tuple[ScoreMod, ...] = () if attn_bias is None else (Bias(before_keys(attn_bias, kv_len, 0.0)),)
        if rel_pos is not None and pos is not None:
            needs(isinstance(rel_pos, AlibiPositionalBias), "positions must come with ALiBi", type(rel_pos).__name__, "Leave pos out")
            assert isinstance(rel_pos, AlibiPositionalBias)
            found = (Bias(before_keys(rel_pos.forward_custom_pos(pos), kv_len, 0.0)),)
        elif isinstance(rel_pos, PositionBias):
            found = rel_pos.in_kernel(*lengths, front)
        elif rel_pos is not None:
            found = (Bias(before_keys(rel_pos(*lengths), kv_len, 0.0)),)
        if self.data_dependent_alibi is not None:
            found = self.data_dependent_alibi.in_kernel(x, front)
        if self.rel_proj_pos_bias is not None:
            # A call's own keys in front have positions here, as in the package; memories have none.
            reach = lengths[1] if self.num_mem_kv else kv_len
            found = (*found, Bias(before_keys(self.rel_proj_pos_bias(q_input, reach), kv_len, 0.0)))
        return found


def _continued(now: Tensor, before: Tensor | None, mem_len: int) -> Tensor:
    """Keys or values of a cache, between the memories and those of this call."""
    return now if before is None else torch.cat((now[..., :mem_len, :], before, now[..., mem_len:, :]), -2)
