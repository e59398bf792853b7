"""Models of the x-transformers package on this package's attention: the same parameters and state dict, in O(length) memory.

``fuse`` gives the modules of a model that attend the classes of this file, which compute what the package's own compute. What a layer leaves
behind (``Intermediates``) is made when it is read; ALiBi and causal forgetting biases are added inside the kernels instead of beforehand.
Needs x-transformers (2.31 was tried); it is imported when something is asked for.

Example:
    >>> from x_transformers import Decoder  # doctest: +SKIP
    >>> model = fuse(Decoder(dim=64, depth=2, heads=4, attn_selective=True))  # doctest: +SKIP
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import pad

from fused_attn.backends import require_name
from fused_attn.nn.x_transformers import attend as own
from fused_attn.nn.x_transformers.intermediates import Intermediates
from fused_attn.nn.x_transformers.refusals import refuse
from fused_attn.normalizers import Gumbel, Hard, Normalizer, Sigmoid, TopK
from fused_attn.score_mods import ALiBi, Bias, DecayBias, ScoreMod

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, backend: str = "auto") -> Model:
    """Puts attention of x-transformers' modules on this package, in place; parameters, buffers and names stay.

    Args:
        model: any module that holds the package's ``Attention`` or ``Attend``, at any depth, or is one.
        backend: "auto", or a name that runs or raises, never falls back.

    Returns:
        The model itself.

    Raises:
        ValueError: there is nothing to fuse, or no such backend.
        NotImplementedError: ``flash_pack_seq``, whose packed sequences this package takes as ``fused_attn.Documents``.
    """
    require_name(backend)
    swaps = _swaps()
    attends = [m for m in model.modules() if isinstance(m, _package("attend").Attend) and type(m) in (*swaps, *swaps.values())]
    if not attends:
        raise ValueError("model must hold an Attend of x-transformers; got none. Fuse the model that was built with the package.")
    for attend in attends:
        _configure(attend, backend)
    for module in model.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]
    for module in model.modules():
        if isinstance(module, _package("x_transformers").AttentionLayers):
            _keep_scores(module)
    return model


def unfuse(model: Model) -> Model:
    """Gives the modules of a fused model the package's classes back."""
    back = {fused: plain for plain, fused in _swaps().items()}
    for module in model.modules():
        if type(module) in back:
            module.__class__ = back[type(module)]
    return model


@contextmanager
def flash_with_everything(backend: str = "auto") -> Iterator[None]:
    """Models that are built inside may have ``attn_flash=True`` beside options that the package's flash path refuses; they come fused.

    The flag is taken away before the package asserts on it. Nothing else of the package changes, and nothing after the block.

    Args:
        backend: as of ``fuse``.

    Raises:
        ValueError: there is no such backend.
    """
    require_name(backend)
    package = _package("x_transformers")
    layers, attention = package.AttentionLayers.__init__, package.Attention.__init__

    def build_layers(self: Any, *args: Any, **kwargs: Any) -> None:
        layers(self, *args, **{name: value for name, value in kwargs.items() if name not in ("attn_flash", "cross_attn_flash")})
        fuse(self, backend)

    def build_attention(self: Any, *args: Any, flash: bool = False, **kwargs: Any) -> None:
        attention(self, *args, **kwargs)
        fuse(self, backend)

    with _building:
        package.AttentionLayers.__init__, package.Attention.__init__ = build_layers, build_attention
        try:
            yield
        finally:
            package.AttentionLayers.__init__, package.Attention.__init__ = layers, attention


_building = threading.RLock()


def _package(module: str) -> Any:
    import importlib

    return importlib.import_module(f"x_transformers.{module}")


@cache
def _swaps() -> dict[type, type]:
    """The package's classes and what stands in for them, made once, for they derive from the package's."""
    attend, layers = _package("attend"), _package("x_transformers")
    _Attend.record = _over(Intermediates, attend.Intermediates)
    return {attend.Attend: _over(_Attend, attend.Attend), layers.Attention: _over(_Attention, layers.Attention)}


def _over(ours: type, base: type) -> type:
    """A class of the package with one of ours laid over it, among this module's names, where pickle looks for it."""
    name = f"Fused{base.__name__}"
    made = type(name, (ours, base), {"__module__": __name__, "__doc__": f"The package's ``{base.__name__}`` on this package's attention."})
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Makes the classes when a pickle asks for one of them first."""
    if name in ("FusedIntermediates", "FusedAttend", "FusedAttention"):
        _swaps()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Attend(own.Attend):
    record: Any

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Intermediates]:
        out, left = super().forward(*args, **kwargs)
        left.__class__ = self.record
        return out, left


class _Attention(nn.Module):
    """What is laid over the package's class: biases as modifications, and no cache for selective attention."""

    attend: own.Attend
    num_mem_kv: int
    rel_proj_pos_bias: nn.Module | None

    @property
    def data_dependent_alibi(self) -> nn.Module | None:
        """None where its bias is handed over in ``forward``, so that the package does not make the array."""
        return self._modules.get("data_dependent_alibi") if self.rel_proj_pos_bias is not None else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache") is not None and self.attend.selective:
            raise ValueError(
                "cache must be None with selective attention, which needs the scores of all earlier queries; got a cache. "
                "Decode without one, as the package's own wrapper does where can_cache_kv is False."
            )
        if self.rel_proj_pos_bias is None:
            kwargs = self._with_biases(x, kwargs)
        return super().forward(x, *args, **kwargs)

    def _with_biases(self, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords with biases as modifications; a forgetting bias takes the place of any other, as in the package."""
        forgetting = self._modules.get("data_dependent_alibi")
        alibi: Any = kwargs.get("rel_pos")
        if forgetting is not None:
            return {**kwargs, "rel_pos": None, "attn_bias": _forgetting(forgetting, x, self.num_mem_kv)}
        is_plain = isinstance(alibi, _package("x_transformers").AlibiPositionalBias) and kwargs.get("pos") is None and not self.num_mem_kv
        if is_plain and kwargs.get("attn_bias") is None:
            slopes = alibi.slopes[:, 0, 0]
            return {**kwargs, "rel_pos": None, "attn_bias": (ALiBi(pad(slopes, (0, alibi.total_heads - len(slopes)))),)}
        return kwargs


def _forgetting(module: Any, x: Tensor, front: int) -> tuple[ScoreMod, ...]:
    """Data-dependent ALiBi as a modification: c_i - c_j in the kernels where it is causal, an array otherwise."""
    if type(module) is _package("x_transformers").DataDependentAlibi and module.causal and not front:
        return (DecayBias((module.to_forget_gates(x) * module.post_log_scale).cumsum(-1)),)
    return (Bias(pad(module(x), (front, 0))),)


def _configure(attend: Any, backend: str) -> None:
    """Gives an ``Attend`` of the package what this package's class of that name reads besides."""
    if attend.flash_pack_seq:
        raise refuse("flash_pack_seq", "Pack sequences with fused_attn.attention(mask=Documents.from_cu_seqlens(...))")
    attend.normalizer, attend.custom_attn_fn = _normalizer(attend.attn_fn)
    attend.backend, attend.keeps_scores = backend, False


def _normalizer(function: Any) -> tuple[Normalizer | None, Any]:
    """What makes weights of scores, and a function of the user's own where it is none of the package's."""
    package, options = _package("attend"), dict(getattr(function, "keywords", {}))
    called = function.func if isinstance(function, partial) else function
    if called is functional.softmax:
        return None, None
    if called is torch.sigmoid or called is functional.sigmoid:
        return Sigmoid(), None
    if called is package.one_hot_straight_through:
        return Hard(), None
    if called is package.sparse_topk_attn:
        return TopK(options["sparse_topk"], options["straight_through"]), None
    if called is functional.gumbel_softmax:
        return Gumbel(options["tau"], options["hard"]), None
    return None, function


def _keep_scores(layers: Any) -> None:
    """Residual attention (RealFormer) reads every layer's scores: they come with the layer's own pass instead of one more."""
    for kind, (_, block, _) in zip(layers.layer_types, layers.layers, strict=True):
        if kind in ("a", "c") and type(getattr(block, "attend", None)) in _swaps().values():
            block.attend.keeps_scores = bool(layers.residual_attn if kind == "a" else layers.cross_residual_attn)
