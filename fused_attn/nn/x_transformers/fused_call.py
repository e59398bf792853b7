"""One call of ``fused_attn.attention`` as x-transformers' ``Attend`` makes it, and the arrays that it leaves for later."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_attn.autograd import versions
from fused_attn.auxiliary import AuxOutput, AuxRequest
from fused_attn.checks import captured
from fused_attn.functional import attention
from fused_attn.masks import Causal, Dense, KeyPadding, Mask
from fused_attn.nn.x_transformers.dense import Inputs
from fused_attn.nn.x_transformers.heads import HeadOrder
from fused_attn.nn.x_transformers.intermediates import filled
from fused_attn.score_mods import ScoreMod


@dataclass(frozen=True, eq=False)
class FusedCall:
    """A call of ``fused_attn.attention`` with heads in the kernels' order; its arrays come from calls of their own when they are read.

    Args:
        tensors: q, k, v.
        keywords: of ``attention``.
        order: of the heads.
        prev_attn: the scores of the layer before, among ``keywords`` too.
        grad: whether arrays are differentiable.
        autocast: dtype of the call's autocast.
        versions: how often each tensor had been modified, where that is counted.
    """

    tensors: tuple[Tensor, Tensor, Tensor]
    keywords: dict[str, Any]
    order: HeadOrder
    prev_attn: ScoreMod | None
    grad: bool
    autocast: torch.dtype | None
    versions: tuple[int, ...]

    @classmethod
    def of(
        cls, tensors: tuple[Tensor, Tensor, Tensor], keywords: dict[str, Any], order: HeadOrder, prev_attn: ScoreMod | None
    ) -> FusedCall:
        """The call that is being made, in the modes that it is made in."""
        device = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None
        made = cls(tensors, keywords, order, prev_attn, torch.is_grad_enabled(), autocast, ())
        return made if captured(tensors[0]) else replace(made, versions=made.versions_now())

    def versions_now(self) -> tuple[int, ...]:
        """How often each tensor that an array is made of was modified."""
        return versions([*self.tensors[:2], *tree_leaves((self.keywords["mask"], self.keywords["score_mods"]))])

    def require_unchanged(self) -> None:
        """Raises RuntimeError where a tensor was modified since the call."""
        if self.versions and self.versions != self.versions_now():
            raise RuntimeError(
                "queries, keys, masks and biases must be what they were in the call for arrays of Intermediates to be computed; got some that "
                "were modified in place since. Read the arrays before, or pass clones."
            )

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the tensors as they are, whose copies count anew."""
        self.require_unchanged()
        return {**self.__dict__, "versions": ()}

    def run(self, **more: Any) -> Any:
        return attention(*self.tensors, **{**self.keywords, **more})

    def array(self, name: str) -> Tensor:
        """One of the arrays of ``Intermediates`` in the package's order of heads."""
        q, k, v = self.tensors
        narrow = replace(self, tensors=(q, k, v.detach()[..., :1]), keywords={**self.keywords, "dropout": None})
        if name == "qk_similarities":
            bare = {n: narrow.keywords[n] for n in ("scoring", "backend")}
            mods = () if self.prev_attn is None else (self.prev_attn,)
            _, aux = attention(*narrow.tensors, **bare, score_mods=mods, return_aux=AuxRequest(scores=True))
            assert aux.scores is not None
            return self.order.tiled(aux.scores)
        if name == "pre_softmax_attn":
            return self.scores(narrow.run(return_aux=AuxRequest(scores=True))[1])
        sinks = self.keywords["sinks"]
        request = AuxRequest(probs=True, lse=sinks is not None)
        empty_rows = "zero" if self.keywords["normalizer"] is not None else "uniform"
        aux = narrow.run(return_aux=request, empty_rows=empty_rows)[1]
        assert aux.probs is not None
        return self._with_sink(aux.probs, None if aux.lse is None else (sinks[:, None] - aux.lse).exp())

    def scores(self, aux: AuxOutput) -> Tensor:
        """What the softmax got, from an auxiliary output that has it."""
        assert aux.scores is not None
        sinks = self.keywords["sinks"]
        return self._with_sink(filled(self.order.tiled(aux.scores)), None if sinks is None else sinks[:, None], True)

    def _with_sink(self, array: Tensor, column: Tensor | None, is_tiled: bool = False) -> Tensor:
        """The array with the sinks' column [..., heads, q_len|1] in front."""
        array = array if is_tiled else self.order.tiled(array)
        if column is None:
            return array
        column = self.order.tiled(column.to(array.dtype), -2)[..., None]
        return torch.cat((column.expand(*array.shape[:3], 1), array), -1)


def array_of(fused: FusedCall, name: str) -> Tensor:
    """One of the arrays as the call would have given it, wherever it is read; a function, for a compiled graph cannot give out a method."""
    fused.require_unchanged()
    device = fused.tensors[0].device.type
    mode = nullcontext() if fused.autocast is None else torch.autocast(device, dtype=fused.autocast)
    with torch.set_grad_enabled(fused.grad), mode:
        return fused.array(name)


def mask_of(call: Inputs, order: HeadOrder) -> Mask | None:
    """Mask and causality in this package's words."""
    keep = call.mask
    if keep is None:
        return Causal() if call.causal else None
    batch, _, _, kv_len = call.shape
    if isinstance(keep, Mask):
        mask = keep
    elif tuple(keep.shape) == (batch, 1, 1, kv_len):
        mask = KeyPadding(keep[:, 0, 0].clone())  # small, and the caller's to change
    else:
        mask = Dense(order.grouped(keep))
    return Causal() & mask if call.causal else mask
