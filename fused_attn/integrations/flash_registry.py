"""This package's attention as the flash kernel behind torch's own operators, through torch's registry of flash implementations.

Nothing is patched: ``F.scaled_dot_product_attention`` stays torch's, chooses among its kernels as ever, and where it chooses flash, the
operators ``aten::_scaled_dot_product_flash_attention`` and its backward run here. torch.compile, DTensor and context_parallel keep
seeing torch's operators. What reaches them is what torch's rules for flash let through: float16 and bfloat16 on CUDA, no mask tensor.

Example:
    >>> from torch.nn.attention import activate_flash_attention_impl, list_flash_attention_impls, restore_flash_attention_impl
    >>> register()
    >>> "fused_attn" in list_flash_attention_impls()
    True
    >>> activate_flash_attention_impl("fused_attn")  # doctest: +SKIP
    >>> restore_flash_attention_impl()  # doctest: +SKIP
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.attention
from torch import Tensor

from fused_attn.auxiliary import AuxRequest
from fused_attn.backends import require_name
from fused_attn.dropout import Dropout
from fused_attn.functional import attention
from fused_attn.layout import laid_out_like
from fused_attn.masks import Causal
from fused_attn.problem import UnsupportedError

NAME = "fused_attn"


class Handle:
    """Our kernels in torch's dispatcher, from ``activate_flash_attention_impl`` until ``remove``, which torch's restore calls."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Gives the operators back to torch's own kernels."""
        self._library = None


def register(backend: str = "auto", device: str = "cuda") -> None:
    """Makes "fused_attn" known to torch's registry; ``torch.nn.attention.activate_flash_attention_impl("fused_attn")`` switches it on.

    Args:
        backend: "auto", or a name that runs or raises, never falls back.
        device: whose kernels are replaced. torch asks for flash by these operators on "cuda" only; a test may call them on "cpu".

    Raises:
        ValueError: there is no such backend.
        UnsupportedError: this torch has no registry.

    Example:
        >>> register(backend="triton")
    """
    require_name(backend)
    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise UnsupportedError(
            f"registering needs torch.nn.attention.register_flash_attention_impl; got torch {torch.__version__} without it. "
            "Install a newer torch, or route calls with fused_attn.integrations.sdpa."
        )
    torch.nn.attention.register_flash_attention_impl(NAME, register_fn=partial(_activate, backend, device))


def _activate(backend: str, device: str) -> Handle:
    key = torch._C._dispatch_key_for_device(device)
    library = torch.library.Library("aten", "IMPL", key)
    library.impl("_scaled_dot_product_flash_attention", partial(_forward, backend), key)
    library.impl("_scaled_dot_product_flash_attention_backward", partial(_backward, backend), key)
    return Handle(library)


def _keywords(q_len: int, kv_len: int, is_causal: bool, options: dict[str, Any]) -> dict[str, Any]:
    """A flash call as keywords of ``attention``; its causal mask ends where the keys end."""
    return {
        "mask": Causal() if is_causal else None,
        "q_offset": kv_len - q_len if is_causal else None,
        "return_aux": AuxRequest(lse=True),
        **options,
    }


def _forward(
    backend: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    if return_debug_mask:
        raise UnsupportedError(
            "return_debug_mask must be False for the flash implementation fused_attn; got True. "
            "Ask fused_attn.attention for return_aux=AuxRequest(probs=True)."
        )
    if value.shape[-1] != query.shape[-1]:
        raise UnsupportedError(
            f"query and value must share one head_dim in torch's flash operators; got {query.shape[-1]} and {value.shape[-1]}. "
            "Call fused_attn.attention."
        )
    seed = torch.randint(2**63 - 1, (), device=query.device) if dropout_p else torch.zeros((), dtype=torch.int64, device=query.device)
    options = {"scale": scale, "backend": backend, "dropout": Dropout(dropout_p, seed)}
    q_len, kv_len = query.shape[2], key.shape[2]
    out, aux = attention(query, key, value, **_keywords(q_len, kv_len, is_causal, options))
    offset = torch.zeros_like(seed)
    state = torch.stack([seed, offset]).view(torch.uint64)
    return laid_out_like(out, query), aux.lse, None, None, q_len, kv_len, state, offset.view(torch.uint64), query.new_empty(0)


def _backward(
    backend: str,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of a softmax that ends in ``out`` and ``logsumexp``, of which these keys may be a part only.

    Ring attention (torch's context_parallel) hands over one block of keys and the statistics of all of them. With
    w = exp(lse of the block - logsumexp) the block's share of the probabilities is w times its own softmax, so its gradients are those
    of its own output for w * grad_out, and of its own lse for w * grad_out (own output - out). For the whole row w = 1 and the second is 0.
    """
    options = {"scale": scale, "backend": backend, "dropout": Dropout(dropout_p, philox_seed.view(torch.int64)[:1])}
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    with torch.enable_grad(), _autograd():
        block, aux = attention(*leaves, **_keywords(query.shape[2], key.shape[2], is_causal, options))
        weight = torch.where(aux.lse.isneginf(), 0.0, (aux.lse - logsumexp).exp()).detach()[..., None]
        dout = grad_out.to(weight.dtype) * weight
        dlse = (dout * (block.detach() - out)).sum(-1)
        grads = torch.autograd.grad((block, aux.lse), leaves, (dout.to(block.dtype), dlse))
    return tuple(laid_out_like(g, t) for t, g in zip(leaves, grads, strict=True))


def _autograd() -> Any:
    """Below torch's own autograd nothing is recorded unless it is let in again."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)
