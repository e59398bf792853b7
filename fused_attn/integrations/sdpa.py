"""Routes ``torch.nn.functional.scaled_dot_product_attention`` here, for code that cannot be edited.

Everything that reads the attribute when it calls (``F.scaled_dot_product_attention``, ``nn.MultiheadAttention``, most model code) is
routed; a name bound by ``from torch.nn.functional import scaled_dot_product_attention`` beforehand is not, and neither are
torch's fused inference paths (``torch.backends.mha``), which never call it. What goes to torch's own function all the same, and why,
stands in docs/replacing-sdpa.md: tensor subclasses, meta tensors, ``torch.jit``, torch's ``context_parallel``, and calls for which torch's
kernels are restricted.

Example:
    >>> import torch.nn.functional as F
    >>> q, original = torch.randn(1, 2, 4, 8), F.scaled_dot_product_attention
    >>> with patched():
    ...     out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    >>> out.allclose(original(q, q, q, is_causal=True), atol=1e-6), F.scaled_dot_product_attention is original
    (True, True)
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.compiler.config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.jit._builtins import _get_builtin_table
from torch.nn.attention.bias import CausalBias
from torch.overrides import handle_torch_function, has_torch_function

from fused_attn import fingerprint
from fused_attn.backends import require_name
from fused_attn.checks import is_causal_bias
from fused_attn.functional import torch_attention

# The one function that every build of torch exports under this name; patching the attribute elsewhere does not change it.
_original = torch._C._nn.scaled_dot_product_attention
_lock = threading.Lock()
# Backends of the requests in force, the latest last; several threads may hold one at a time.
_requests: list[_Request] = []
# What the attribute held before, one entry each time that it was not the stand-in already.
_displaced: list[object] = []


class _Request:
    """One ``patched`` or ``install`` in force; compared by identity.

    Args:
        backend: its backend.
        level: how many functions were displaced when it began; it needs the last of them to stay away.
    """

    def __init__(self, backend: str, level: int) -> None:
        self.backend, self.level = backend, level


_installed: list[_Request] = []


# FakeTensor and FunctionalTensor stand for plain tensors while torch.compile traces through torch's own modules.
_PLAIN = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)


def _is_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether torch and a backend of ours see the same in these tensors; what is no tensor at all gets an error of ours."""
    for t in tensors:
        if type(t) not in _PLAIN:
            if isinstance(t, Tensor) or hasattr(t, "__torch_function__"):
                return False
        elif t.is_nested or t.is_meta:
            return False
    return True


def _torchs_turn() -> bool:
    """Whether torch's own function is meant: a trace is recorded, or ``sdpa_kernel`` or a switch of torch's leaves only some kernels."""
    return torch._C._get_tracing_state() is not None or not (
        torch._C._get_math_sdp_enabled()
        and torch._C._get_flash_sdp_enabled()
        and torch._C._get_mem_efficient_sdp_enabled()
        and torch._C._get_cudnn_sdp_enabled()
        and torch._C._get_overrideable_sdp_enabled()
    )


class _Question(threading.local):
    """Whether a subclass was shown the function below and has not passed it on yet."""

    open = False


_question = _Question()


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
    tensors = (query, key, value)
    given = tensors if attn_mask is None else (*tensors, attn_mask)
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
    # A CausalBias only waits for torch's function; it is a mask here. Modes come first: they would see every look at a tensor.
    heard = tensors if is_causal_bias(attn_mask) else given
    latest = _requests[-1:]  # one look: another thread may leave meanwhile
    if latest and not has_torch_function(heard) and _is_plain(heard) and not _torchs_turn():
        return torch_attention(tensors, attn_mask, options, latest[0].backend)
    if has_torch_function(given) and all(isinstance(t, Tensor) for t in given):
        return _overridden(given, attn_mask, options)
    if not torch._C._is_torch_function_enabled() and _question.open:
        _question.open = False
        with torch._C._EnableTorchFunction():
            return _original(query, key, value, attn_mask, **options)
    return _original(query, key, value, attn_mask, **options)


def _overridden(given: tuple[Tensor, ...], attn_mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    """Lets a function mode or the class of an argument see the function that was called, which is the one above.

    A subclass that does not know it passes it on, and is asked again about torch's own: it may have learnt that one on import.
    """
    _question.open = True
    try:
        query, key, value = given[:3]
        return handle_torch_function(scaled_dot_product_attention, given, query, key, value, attn_mask, **options)
    finally:
        _question.open = False


_of_bias = CausalBias.__dict__["__torch_function__"]
_answer_of_bias = _of_bias.__func__


def _recognising(cls: Any, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """A CausalBias that knows torch's function by a name bound before the patch, too: it compares with the name in force."""
    if func is _original:
        func = torch.nn.functional.scaled_dot_product_attention
    return _answer_of_bias(cls, func, types, args, kwargs)


_MARK = re.compile(r"\[fused_attn [^\]]*\]")


def _mark_caches() -> None:
    """Says whose attention is traced to torch's caches of compiled graphs on disk, in the tag they offer.

    A graph that calls a function of torch's around this one (``F.multi_head_attention_forward``) reads the same with and without a patch. The tag's
    default is the process', the value that torch's own setter writes is one thread's.
    """
    config, entry = torch.compiler.config, torch.compiler.config._config["cache_key_tag"]  # type: ignore[attr-defined]
    mark = f"[fused_attn {_requests[-1].backend} {fingerprint.PACKAGE}]" if _requests else ""
    entry.default = _MARK.sub("", entry.default) + mark
    if config.cache_key_tag != entry.default:  # this thread has a tag of its own
        config.cache_key_tag = _MARK.sub("", config.cache_key_tag) + mark


def _is_held() -> bool:
    """Whether a request in force needs the function that was displaced last to stay away."""
    return any(request.level == len(_displaced) for request in _requests)


def _distributes(function: Any) -> bool:
    """Whether torch wrapped its function, as ``context_parallel`` does: without that wrapper a rank would attend to its own shard alone."""
    return str(getattr(function, "__module__", "")).startswith("torch.distributed.")


def _enter(backend: str) -> _Request:
    with _lock:
        current = torch.nn.functional.scaled_dot_product_attention
        displaces = current is not scaled_dot_product_attention and not _distributes(current)
        if displaces:
            _displaced.append(current)
        request = _Request(backend, len(_displaced))
        _requests.append(request)
        if displaces:
            torch.nn.functional.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
            # torch.jit.script compiles no keyword-only default; by this entry it takes the function for torch's own.
            _get_builtin_table()[id(scaled_dot_product_attention)] = "aten::scaled_dot_product_attention"
            CausalBias.__torch_function__ = classmethod(_recognising)  # type: ignore[method-assign,assignment]
        _mark_caches()
    return request


def _leave(request: _Request) -> None:
    with _lock:
        _requests.remove(request)
        _mark_caches()
        # Whoever patched over us meanwhile stays, and puts the stand-in back, which hands everything to torch's own until the next patch ends.
        while _displaced and not _is_held() and torch.nn.functional.scaled_dot_product_attention is scaled_dot_product_attention:
            torch.nn.functional.scaled_dot_product_attention = _displaced.pop()  # type: ignore[assignment]
        if not _displaced:
            _get_builtin_table().pop(id(scaled_dot_product_attention), None)
            CausalBias.__torch_function__ = _of_bias  # type: ignore[method-assign]


@contextmanager
def patched(backend: str = "auto") -> Iterator[None]:
    """Routes torch's function here for a block, or for the calls of a function when used as ``@patched()``; may be nested.

    Args:
        backend: "auto", or a name that runs or raises, never falls back. The innermost block's counts, for all threads.

    Raises:
        ValueError: there is no such backend.
    """
    request = _enter(require_name(backend))
    try:
        yield
    finally:
        _leave(request)


def install(backend: str = "auto") -> None:
    """Routes torch's function here until ``uninstall``. Installing again only changes the backend."""
    require_name(backend)
    uninstall()
    _installed.append(_enter(backend))


def uninstall() -> None:
    """Undoes ``install``; does nothing when nothing is installed."""
    while _installed:
        _leave(_installed.pop())
