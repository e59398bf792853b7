"""x-transformers' ``Attend`` on this package's attention: masks, biases and clamps in the kernels, arrays of scores only where they are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fused_attn import backends
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import Explanation, Target, Verdict
from fused_attn.dropout import Dropout
from fused_attn.functional import explain
from fused_attn.masks import KeyPadding, Mask
from fused_attn.nn.x_transformers import dense
from fused_attn.nn.x_transformers.cope import CoPE, talking
from fused_attn.nn.x_transformers.dense import Inputs
from fused_attn.nn.x_transformers.fused_call import FusedCall, array_of, mask_of
from fused_attn.nn.x_transformers.heads import HeadOrder
from fused_attn.nn.x_transformers.intermediates import ARRAYS, Intermediates
from fused_attn.nn.x_transformers.parameters import constant
from fused_attn.nn.x_transformers.refusals import at_most_one, needs, not_with_flash, refuse
from fused_attn.normalizers import Gumbel, Hard, Normalizer, Sigmoid, TopK
from fused_attn.score_mods import Bias, ScoreMod, SoftCap
from fused_attn.scoring import DotProduct, NegativeL2, Scoring
from fused_attn.selective import Selective


class Attend(nn.Module):
    """Attention as x-transformers' class of that name computes it, options and order of operations included.

    In O(length) memory, but for ``sparse_topk``, ``hard``, ``gumbel_softmax``, talking heads, ``cog_signed``, ``cope``,
    ``inverted_attention``, ``custom_attn_fn`` and a call's ``attn_delta``: these hold arrays of scores (``explain`` says so).

    Args:
        dropout: chance of removal of a weight in training.
        causal: keys at or before the query's position; the last query stands at the last key.
        heads: query heads, needed by talking heads and sinks.
        pre_talking_heads: adds to the scores their mixture over heads.
        post_talking_heads: mixes the weights over heads.
        pre_scale_post_talking_heads: multiplies the weights by a mixture of the scores over heads.
        sparse_topk: softmax over the k largest scores of a row.
        sparse_topk_straight_through: with the gradient of the whole softmax (arXiv 2505.22074).
        scale: of the scores; 1/sqrt(head_dim) by default.
        qk_norm: taken for the package's sake; normalising is ``Attention``'s part.
        l2_distance: scores are -scale * ||q - k||^2.
        sigmoid: weights are sigmoids of the scores.
        gumbel_softmax: softmax of scores with Gumbel noise.
        gumbel_softmax_temp: its temperature.
        gumbel_softmax_hard: whether the largest takes all.
        cog_signed: softmax of absolute scores, times their signs.
        custom_attn_fn: makes weights of scores [batch, heads, q_len, kv_len].
        flash: rows without keys give zeros, and what the package's flash path refuses is refused.
        softclamp_logits: value * tanh(scores / value).
        logit_softclamp_value: that value.
        add_zero_kv: a key and value of zeros in front.
        head_learned_sink: a learned logit per head in the denominator.
        selective: subtracts what earlier queries no longer need (arXiv 2410.02703).
        hard: the largest score takes all, with the gradient of the softmax.
        cope: a ``CoPE``.
        onnxable: taken for the package's sake; nothing differs.
        inverted_attention: softmax over queries, then rows scaled to 1.
        sdp_kwargs: taken for the package's sake; ``backend`` chooses here.
        flash_pack_seq: must be False; packed sequences are ``fused_attn.Documents``.
        backend: "auto", or a name that runs or raises, never falls back.

    Raises:
        AssertionError: options exclude each other.
        NotImplementedError: flash_pack_seq.
        ValueError: there is no such backend.

    Example:
        >>> q, k, v = torch.randn(3, 1, 4, 6, 8).unbind(0)
        >>> out, left = Attend(causal=True, selective=True)(q, k, v)
        >>> out.shape, left.post_softmax_attn.shape
        (torch.Size([1, 4, 6, 8]), torch.Size([1, 4, 6, 6]))
        >>> print(Attend(hard=True).explain(q, k, v).notes[0])
        hard works on whole arrays of scores: O(q_len * kv_len) memory
    """

    record: ClassVar[Callable[..., Intermediates]] = Intermediates

    def __init__(
        self,
        *,
        dropout: float = 0.0,
        causal: bool = False,
        heads: int | None = None,
        pre_talking_heads: bool = False,
        post_talking_heads: bool = False,
        pre_scale_post_talking_heads: bool = False,
        sparse_topk: int | None = None,
        sparse_topk_straight_through: bool = False,
        scale: float | None = None,
        qk_norm: bool = False,
        l2_distance: bool = False,
        sigmoid: bool = False,
        gumbel_softmax: bool = False,
        gumbel_softmax_temp: float = 1.0,
        gumbel_softmax_hard: bool = True,
        cog_signed: bool = False,
        custom_attn_fn: Callable[[Tensor], Tensor] | None = None,
        flash: bool = False,
        softclamp_logits: bool = False,
        logit_softclamp_value: float = 50.0,
        add_zero_kv: bool = False,
        head_learned_sink: bool = False,
        selective: bool = False,
        hard: bool = False,
        cope: CoPE | None = None,
        onnxable: bool = False,
        inverted_attention: bool = False,
        sdp_kwargs: dict[str, bool] | None = None,
        flash_pack_seq: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        topk = sparse_topk is not None
        mixes = {
            "pre_talking_heads": pre_talking_heads,
            "post_talking_heads": post_talking_heads,
            "pre_scale_post_talking_heads": pre_scale_post_talking_heads,
        }
        at_most_one(sigmoid=sigmoid, hard=hard, l2_distance=l2_distance, gumbel_softmax=gumbel_softmax, sparse_topk=topk)
        not_with_flash(flash, sigmoid=sigmoid, hard=hard, sparse_topk=topk, inverted_attention=inverted_attention, **mixes)
        not_with_flash(
            flash, selective=selective, cog_signed=cog_signed, head_learned_sink=head_learned_sink, softclamp_logits=softclamp_logits
        )
        needs(causal or not selective, "selective attention must be causal", "causal=False", "Pass causal=True, or leave selective out")
        needs(
            logit_softclamp_value > 0 or not softclamp_logits,
            "logit_softclamp_value must be positive",
            repr(logit_softclamp_value),
            "Pass the largest score wanted",
        )
        if flash and flash_pack_seq:
            raise refuse("flash_pack_seq", "Pack sequences with fused_attn.attention(mask=Documents.from_cu_seqlens(...))")
        self.dropout, self.causal, self.heads, self.scale, self.flash = dropout, causal, heads, scale, flash
        self.backend = backends.require_name(backend)
        self.l2_distance, self.cog_signed, self.custom_attn_fn = l2_distance, cog_signed, custom_attn_fn
        self.softclamp_logits, self.logit_softclamp_value = softclamp_logits, logit_softclamp_value
        self.add_zero_kv, self.selective, self.inverted_attention = add_zero_kv, selective, inverted_attention
        self.keeps_scores = False  # whether every call's pre_softmax_attn is wanted at once, for the layer that follows
        self.normalizer: Normalizer | None = None
        if sigmoid:
            self.normalizer = Sigmoid()
        elif hard:
            self.normalizer = Hard()
        elif sparse_topk is not None:
            self.normalizer = TopK(sparse_topk, sparse_topk_straight_through)
        elif gumbel_softmax:
            self.normalizer = Gumbel(gumbel_softmax_temp, gumbel_softmax_hard)
        self.pre_softmax_talking_heads = talking(heads or 0) if pre_talking_heads else None
        self.post_softmax_talking_heads = talking(heads or 0) if post_talking_heads else None
        self.pre_scale_post_talking_heads = talking(heads or 0) if pre_scale_post_talking_heads else None
        self.head_attn_sink = constant(0.0, heads or 0) if head_learned_sink else None
        self.cope = cope

    def scoring(self, head_dim: int, flash: bool) -> Scoring:
        """How a score comes from a query and a key of that size."""
        if not self.l2_distance:
            return DotProduct(self.scale)
        # The package's flash path writes distances as products of vectors with two more elements, whose number its default scale counts.
        return NegativeL2((head_dim + 2 * flash) ** -0.5 if self.scale is None else self.scale)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Mask | None = None,
        attn_bias: Tensor | Sequence[ScoreMod] | None = None,
        prev_attn: Tensor | None = None,
        attn_delta: Tensor | None = None,
        row_mask: Tensor | None = None,
        flash_pack_seq_kwargs: dict[str, Any] | None = None,
        causal: bool | None = None,
    ) -> tuple[Tensor, Intermediates]:
        """Output and what it was made of.

        Args:
            q: queries [batch, heads, q_len, head_dim].
            k: keys [batch, kv_heads, kv_len, head_dim]; query head n uses key head n % kv_heads.
            v: values [batch, kv_heads, kv_len, value_dim].
            mask: bool [batch, kv_len], or broadcastable to [batch, heads, q_len, kv_len]; True may attend. Or a mask of this package that
                is the same for all heads and leaves every query a key, in O(length) memory.
            attn_bias: float tensor that broadcasts to the scores, or modifications of this package (``ALiBi``, ``DecayBias``, ``Bias``),
                which need no such tensor.
            prev_attn: scores of the layer before (RealFormer, arXiv 2012.11747).
            attn_delta: added to the weights.
            row_mask: bool [batch, q_len] of inverted attention.
            flash_pack_seq_kwargs: must be None.
            causal: instead of the constructor's, where it is not flash.

        Returns:
            out [batch, heads, q_len, value_dim], zeros in rows whose every key ``mask`` hides; a row that only mask and causality together
            leave without keys takes the mean of all values, or zeros with flash. And the intermediates, computed when they are read.
        """
        call = self._call(q, k, v, (mask, attn_bias, prev_attn, attn_delta, causal))
        if flash_pack_seq_kwargs is not None:
            raise refuse("flash_pack_seq_kwargs", "Pack sequences with fused_attn.attention(mask=Documents.from_cu_seqlens(...))")
        if self._dense_because(attn_delta):
            call = replace(call, mask=call.keep)
            out, arrays = dense.attention(self, call, attn_delta, row_mask)
        else:
            fused = self._fused(call)
            out, arrays = self._run(fused)
        if isinstance(call.mask, Tensor):
            out = out.masked_fill(~call.mask.any(-1, keepdim=True), 0.0)
        return out, arrays

    def explain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Mask | None = None,
        attn_bias: Tensor | Sequence[ScoreMod] | None = None,
        prev_attn: Tensor | None = None,
        attn_delta: Tensor | None = None,
        *,
        causal: bool | None = None,
        on: str | Target | None = None,
    ) -> Explanation:
        """Which backend ``forward`` would run for these arguments, and why each other one would not; see ``fused_attn.explain``."""
        call = self._call(q, k, v, (mask, attn_bias, prev_attn, attn_delta, causal))
        reason = self._dense_because(attn_delta)
        if reason:
            note = f"{reason} works on whole arrays of scores"
            rows = tuple(Verdict(name, "" if name == backends.EAGER else note) for name in backends.names())
            return Explanation(backends.EAGER, rows, (f"{note}: O(q_len * kv_len) memory",))
        fused = self._fused(call)
        return explain(*fused.tensors, **{n: value for n, value in fused.keywords.items() if n != "backend"}, on=on)

    def _call(self, q: Tensor, k: Tensor, v: Tensor, terms: tuple[Any, ...]) -> Inputs:
        """The arguments as one call: a key of zeros added, biases as modifications, the mask 4-D."""
        mask, attn_bias, prev_attn, attn_delta, causal = terms
        flash = self.flash and attn_delta is None
        needs(not (flash and prev_attn is not None), "prev_attn must be None with flash", "a tensor", "Build Attend without flash")
        mask = mask.keep_keys if isinstance(mask, KeyPadding) else mask
        if isinstance(mask, Tensor):
            needs(mask.dtype == torch.bool, "mask must be bool, True where a pair may attend", str(mask.dtype), "Convert it with .bool()")
            needs(not flash or mask.dim() in (2, 4), "mask must be 2-D or 4-D with flash", f"{mask.dim()}-D", "Insert dimensions of size 1")
            mask = mask[:, None, None] if mask.dim() == 2 else mask[(None,) * (4 - mask.dim())]
        causal = self.causal if causal is None or flash else causal
        v = v.expand(-1, k.shape[1], -1, -1) if v.shape[1] == 1 else v  # polar positions make keys of every head out of one
        biases = (Bias(attn_bias),) if isinstance(attn_bias, Tensor) else tuple(attn_bias or ())
        if self.add_zero_kv:
            whole = Inputs(q, k, v, mask, biases, None, False)
            biases = tuple([Bias(nn.functional.pad(_as_tensor(mod, whole), (1, 0))) for mod in biases])
            k, v = (nn.functional.pad(t, (0, 0, 1, 0)) for t in (k, v))
            mask = None if whole.keep is None else nn.functional.pad(whole.keep, (1, 0), value=True)
        return Inputs(q, k, v, mask, biases, prev_attn, bool(causal) and q.shape[2] != 1)

    def _dense_because(self, attn_delta: Tensor | None) -> str:
        """The option that no kernel computes; empty where there is none."""
        options = {
            "pre_talking_heads": self.pre_softmax_talking_heads is not None,
            "post_talking_heads": self.post_softmax_talking_heads is not None,
            "pre_scale_post_talking_heads": self.pre_scale_post_talking_heads is not None,
            "cog_signed": self.cog_signed,
            "cope": self.cope is not None,
            "inverted_attention": self.inverted_attention,
            "custom_attn_fn": self.custom_attn_fn is not None,
            "attn_delta": attn_delta is not None,
            "sigmoid with head_learned_sink": isinstance(self.normalizer, Sigmoid) and self.head_attn_sink is not None,
        }
        kinds = {"hard": Hard, "sparse_topk": TopK, "gumbel_softmax": Gumbel}
        options |= {name: isinstance(self.normalizer, kind) for name, kind in kinds.items()}
        return next((name for name, given in options.items() if given), "")

    def _fused(self, call: Inputs) -> FusedCall:
        if self.keeps_scores or call.prev_attn is not None:
            # Keys and values of every head are short; scores in another order of heads would be one more array for every layer.
            call = replace(call, k=_of_every_head(call.k, call.q.shape[1]), v=_of_every_head(call.v, call.q.shape[1]))
        order = HeadOrder(call.q.shape[1], call.k.shape[1])
        prev = None if call.prev_attn is None else Bias(order.grouped(call.prev_attn, -3))
        mods = [*([] if prev is None else [prev]), *[order.of_mod(mod) for mod in call.biases]]
        mods += [SoftCap(float(self.logit_softclamp_value))] if self.softclamp_logits else []
        mods += [Selective()] if self.selective else []
        mask = mask_of(call, order)
        # Rows that lost their keys to a mask and to causality together; what a mask alone empties is zeroed afterwards.
        emptied = call.causal and (isinstance(call.mask, Tensor) or call.shape[3] < call.shape[2])
        uniform = emptied and not self.flash and self.normalizer is None and self.head_attn_sink is None
        keywords = {
            "mask": mask,
            "scoring": self.scoring(call.q.shape[3], self.flash),
            "q_offset": call.shape[3] - call.shape[2],
            "score_mods": tuple(mods),
            # A copy, for a parameter may be stepped on before an array is read.
            "sinks": None if self.head_attn_sink is None else order.grouped(self.head_attn_sink.clone(), 0),
            "dropout": Dropout(self.dropout) if self.training and self.dropout > 0 else None,
            "normalizer": self.normalizer,
            "empty_rows": "uniform" if uniform else "zero",
            "backend": self.backend,
        }
        return FusedCall.of((order.grouped(call.q), call.k, call.v), keywords, order, prev)

    def _run(self, fused: FusedCall) -> tuple[Tensor, Intermediates]:
        arrays = self.record(**{name: partial(array_of, fused, name) for name in ARRAYS})
        if not self.keeps_scores:
            return fused.order.tiled(fused.run()), arrays
        out, aux = fused.run(return_aux=AuxRequest(scores=True))
        arrays.pre_softmax_attn = fused.scores(aux)
        return fused.order.tiled(out), arrays


def _of_every_head(tensor: Tensor, heads: int) -> Tensor:
    """[batch, kv_heads, ...] repeated to [batch, heads, ...]; one for all stays, whose order of heads is every order."""
    return tensor if tensor.shape[1] in (1, heads) else tensor.repeat(1, heads // tensor.shape[1], 1, 1)


def _as_tensor(mod: ScoreMod, call: Inputs) -> Tensor:
    """What a modification adds to every score, where something must be added to it."""
    if isinstance(mod, Bias):
        return mod.bias
    return mod.apply(call.q.new_zeros(call.shape), call.grid)
