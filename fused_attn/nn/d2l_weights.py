"""The weights of layers of "Dive into Deep Learning": made when somebody reads them, or in the call where a module of its own drops them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn.autograd import versions as versions_of
from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import require_name
from fused_attn.checks import captured
from fused_attn.dropout import Dropout
from fused_attn.functional import attention
from fused_attn.nn.d2l_functions import lengths_mask
from fused_attn.torch_sdpa import ArgumentError, ArgumentTypeError


def _kept(tensor: Tensor) -> Tensor:
    """A tensor that an in-place change cannot reach unseen: a clone where nothing counts such changes."""
    return tensor.clone() if captured(tensor) or tensor.is_inference() else tensor


@dataclass(frozen=True)
class Call:
    """What a layer's last call scored, kept until somebody asks for the weights: O(length) memory.

    Args:
        q: [batch, heads, queries, size].
        k: [batch, heads, keys, size].
        valid_lens: [batch] or one for each query, or None.
        options: of ``attention``, besides the mask.
        with_grad: whether the weights are differentiable.
        is_wide: whether they are float32 whatever the dtype of q, as torch's softmax makes them under autocast.
        versions: of the tensors, where they are counted.
    """

    q: Tensor
    k: Tensor
    valid_lens: Tensor | None
    options: dict[str, Any]
    with_grad: bool
    is_wide: bool
    versions: tuple[int, ...]

    @classmethod
    def of(cls, q: Tensor, k: Tensor, valid_lens: Tensor | None, options: dict[str, Any]) -> Call:
        """The call that is being made, in the modes that it is made in."""
        kind = q.device.type
        is_wide = not q.is_meta and torch.is_autocast_enabled(kind) and torch.float64 not in (q.dtype, k.dtype)
        if is_wide:
            q, k = (t.to(torch.get_autocast_dtype(kind)) for t in (q, k))
        q, k = _kept(q), _kept(k)
        valid_lens = None if valid_lens is None else _kept(valid_lens)
        versions = () if captured(q) else versions_of((q, k, valid_lens))
        return cls(q, k, valid_lens, options, torch.is_grad_enabled(), is_wide, versions)

    def weights(self) -> Tensor:
        """[batch * heads, queries, keys], before dropout, differentiable where the call was, whatever the modes are now."""
        if self.versions and versions_of((self.q, self.k, self.valid_lens)) != self.versions:
            raise RuntimeError(
                "queries, keys and valid_lens must be what they were in the call for attention_weights to be computed; got some that were modified "
                "in place since. Read attention_weights before, or pass clones."
            )
        if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self._made()
        return self._made()

    def _made(self) -> Tensor:
        """Outside autocast, which chooses dtypes of its own."""
        kind = self.q.device.type
        if self.q.is_meta or not torch.is_autocast_enabled(kind):
            return self._computed()
        with torch.autocast(kind, enabled=False):
            return self._computed()

    def _computed(self) -> Tensor:
        q, k = self.q, self.k
        with torch.set_grad_enabled(self.with_grad):
            if self.is_wide:
                q, k = q.float(), k.float()
            mask = lengths_mask(self.valid_lens, q.shape[0], q.shape[-2])
            _, aux = attention(q, k, k[..., :1].detach(), mask=mask, return_aux=AuxRequest(probs=True), **self.options)
            return aux.probs.flatten(0, 1)  # type: ignore[union-attr]


class Weighing(nn.Module):
    """What the two ways to score share: dropout of the weights, and the weights themselves for who asks.

    ``dropout`` may be replaced: ``nn.Dropout`` and ``nn.Identity`` stay inside the kernels; any other module is called on the weights
    [batch * heads, queries, keys], O(queries * keys) memory.

    Args:
        dropout: chance that a weight is removed while training.
        backend: handed to ``fused_attn.attention``.

    Raises:
        ValueError: dropout is no chance, or there is no such backend.
    """

    def __init__(self, dropout: float, backend: str) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.backend = require_name(backend)
        self._last: Call | Tensor | None = None

    @property
    def attention_weights(self) -> Tensor:
        """The last call's weights before dropout, [batch * heads, queries, keys], differentiable; computed when they are first read.

        A subclass that computes its own, as the book's layers do, may assign them.

        Raises:
            AttributeError: no call yet.
            RuntimeError: queries, keys or lengths were modified in place since.
        """
        if self._last is None:
            raise AttributeError("attention_weights must be read after a call; got none yet. Call the layer first.")
        if isinstance(self._last, Call):
            self._last = self._last.weights()
        return self._last

    @attention_weights.setter
    def attention_weights(self, weights: Tensor) -> None:
        self._last = weights

    def __getattr__(self, name: str) -> Any:
        # torch's own answer to a property's AttributeError is that there is no such attribute.
        if name == "attention_weights" and self.__dict__.get("_last") is None:
            return Weighing.attention_weights.fget(self)  # type: ignore[attr-defined]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, valid_lens: Tensor | None, **scoring: Any) -> Tensor:
        """q [batch, heads, queries, size], k [batch, heads, keys, size] and v [batch, heads, keys, features], or all without heads."""
        is_3d = q.dim() == 3
        q, k, v = [t[:, None] if t.dim() == 3 else t for t in (q, k, v)]
        options = {"empty_rows": "uniform", "backend": self.backend, **scoring}
        try:
            if type(self.dropout) in (nn.Dropout, nn.Identity):
                p = getattr(self.dropout, "p", 0.0) if self.dropout.training else 0.0
                mask = lengths_mask(valid_lens, q.shape[0], q.shape[-2])
                out: Tensor = attention(q, k, v, mask=mask, dropout=Dropout(p) if p else None, **options)
                self._last = Call.of(q, k, valid_lens, options)
            else:
                self._last = Call.of(q, k, valid_lens, options).weights()
                out = (self.dropout(self._last) @ v.flatten(0, 1)).unflatten(0, v.shape[:2])
        except ValueError as error:
            raise ArgumentError(*error.args) from None
        except TypeError as error:
            raise ArgumentTypeError(*error.args) from None
        return out.squeeze(1) if is_3d else out
