"""Routes ``torch.nn.functional.scaled_dot_product_attention`` here, for code that cannot be edited.

Everything that reads the attribute when it calls (``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, most model code) is
routed; a name bound by ``from torch.nn.functional import scaled_dot_product_attention`` beforehand is not, and neither are
torch's fused inference paths (``torch.backends.mha``), which never call it. Only plain tensors are routed: nested tensors, tensor
subclasses (DTensor, ...) and meta tensors go to torch's own function, as does whatever fused_attn itself calls.

Example:
    >>> import torch.nn.functional as F
    >>> q, original = torch.randn(1, 2, 4, 8), F.scaled_dot_product_attention
    >>> with patched():
    ...     out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> out.allclose(original(q, q, q, is_causal=True), atol=1e-6), F.scaled_dot_product_attention is original
    (True, True)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fused_attn.functional import torch_attention

# The one function that every build of torch exports under this name; patching the attribute elsewhere does not change it.
_original = torch._C._nn.scaled_dot_product_attention
_lock = threading.Lock()
# Backends of the requests in force, the latest last; several threads may hold one at a time.
_requests: list[_Request] = []
_displaced: list[object] = []


class _Request:
    """One ``patched`` or ``install`` in force; compared by identity."""

    def __init__(self, backend: str) -> None:
        self.backend = backend


_installed: list[_Request] = []


# FakeTensor and FunctionalTensor stand for plain tensors while torch.compile traces through torch's own modules.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def _is_plain(*tensors: object) -> bool:
    return all(type(t) in _PLAIN and not t.is_nested and not t.is_meta for t in tensors)  # type: ignore[attr-defined]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What stands in for torch's function while a patch is in force."""
    if not _requests or not _is_plain(query, key, value, *(() if attn_mask is None else (attn_mask,))):
        return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    return torch_attention((query, key, value), attn_mask, options, _requests[-1].backend)


def _enter(backend: str) -> _Request:
    request = _Request(backend)
    with _lock:
        if torch.nn.functional.scaled_dot_product_attention is not scaled_dot_product_attention:
            _displaced.append(torch.nn.functional.scaled_dot_product_attention)
            torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
        _requests.append(request)
    return request


def _leave(request: _Request) -> None:
    with _lock:
        _requests.remove(request)
        # Whoever patched over us meanwhile stays; what they kept of ours passes through to torch's own.
        if not _requests and torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention:
            torch.nn.functional.scaled_dot_product_attention = _displaced[-1]  # type: ignore[assignment]
            _displaced.clear()


@contextmanager
def patched(backend: str = "auto") -> Iterator[None]:
    """Routes torch's function here for a block, or for the calls of a function when used as ``@patched()``; may be nested.

    Args:
        backend: "auto", or a name that runs or raises, never falls back. The innermost block's counts, for all threads.
    """
    request = _enter(backend)
    try:
        yield
    finally:
        _leave(request)


def install(backend: str = "auto") -> None:
    """Routes torch's function here until ``uninstall``. Installing again only changes the backend."""
    uninstall()
    _installed.append(_enter(backend))


def uninstall() -> None:
    """Undoes ``install``; does nothing when nothing is installed."""
    while _installed:
        _leave(_installed.pop())
