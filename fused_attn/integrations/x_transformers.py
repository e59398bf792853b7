"""Models of the x-transformers package on this package's attention: the same parameters and state dict, in O(length) memory.

``fuse`` gives the modules of a model that attend the classes of this file, which compute what the package's own compute. What a layer leaves
behind (``Intermediates``) is made when it is read; ALiBi and causal forgetting biases are added inside the kernels instead of beforehand.
Needs x-transformers (2.31 was tried); it is imported when something is asked for.

Example:
    >>> from x_transformers import Decoder  # doctest: +SKIP
    >>> model = fuse(Decoder(dim=64, depth=2, heads=4, attn_selective=True))  # doctest: +SKIP
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial, wraps
from typing import Any, ClassVar, TypeVar

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
        TypeError: model is no module.
        ValueError: there is nothing to fuse, or no such backend.
        NotImplementedError: ``flash_pack_seq``, whose packed sequences this package takes as ``fused_attn.Documents``.
    """
    require_name(backend)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module of torch; got {type(model).__name__}. Pass the model that was built with x-transformers.")
    swaps = _swaps()
    attends = [m for m in model.modules() if isinstance(m, _package("attend").Attend) and type(m) in (*swaps, *swaps.values())]
    if not attends:
        raise ValueError("model must hold an Attend of x-transformers; got none. Fuse the model that was built with the package.")
    for attend in attends:
        if attend.flash_pack_seq:
            raise refuse("flash_pack_seq", "Pack sequences with fused_attn.attention(mask=Documents.from_cu_seqlens(...))")
    for attend in attends:
        attend.backend, attend.keeps_scores = backend, False
    for module in model.modules():
        if type(module) in swaps:
            module.__class__ = swaps[type(module)]
    for module in model.modules():
        if isinstance(module, _Attention):
            _sums_of(module)
        if isinstance(module, _package("x_transformers").AttentionLayers):
            _keep_scores(module)
        _cache_if_possible(module)
    return model


def unfuse(model: Model) -> Model:
    """Gives the modules of a fused model the package's classes back."""
    back = {fused: plain for plain, fused in {**_swaps(), **_sums()}.items()}
    for module in model.modules():
        if type(module) in back:
            module.__class__ = back[type(module)]
        module.__dict__.update({"can_cache_kv": True} if module.__dict__.pop(_COULD_CACHE, False) else {})
    return model


@contextmanager
def flash_with_everything(backend: str = "auto") -> Iterator[None]:
    """Models that are built inside may have ``attn_flash=True`` beside options that the package's flash path refuses; they come fused.

    The flag is taken away before the package asserts on it, so that rows without keys are those of the package without flash. Nothing else
    of the package changes, nothing after the block, and nothing for other threads.

    Args:
        backend: as of ``fuse``.

    Raises:
        ValueError: there is no such backend.
    """
    require_name(backend)
    _Patch.enter()
    token = _BUILDING.set(backend)
    try:
        yield
    finally:
        _BUILDING.reset(token)
        _Patch.leave()


_BUILDING: ContextVar[str | None] = ContextVar("backend of the models that are being built", default=None)


class _Patch:
    """The package's constructors while any thread is in a block; each asks whether its own is."""

    lock = threading.Lock()
    blocks = 0
    before: ClassVar[dict[Any, Any]] = {}

    @classmethod
    def enter(cls) -> None:
        package, attend = _package("x_transformers"), _package("attend").Attend
        with cls.lock:
            cls.blocks += 1
            if cls.blocks == 1:
                cls.before = {made: made.__init__ for made in (package.AttentionLayers, package.Attention, attend)}
                for made, construct in cls.before.items():
                    made.__init__ = _without_flash(construct)

    @classmethod
    def leave(cls) -> None:
        with cls.lock:
            cls.blocks -= 1
            for made, construct in cls.before.items() if not cls.blocks else ():
                made.__init__ = construct


def _without_flash(construct: Any) -> Any:
    """A constructor of the package that leaves its flags of flash out, wherever they stand, and fuses."""
    signature = inspect.signature(construct)

    @wraps(construct)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        backend = _BUILDING.get()
        if backend is None:
            construct(self, *args, **kwargs)
            return
        given = signature.bind(self, *args, **kwargs)
        given.arguments.pop("flash", None)
        for name in ("attn_flash", "cross_attn_flash"):
            given.arguments.get("kwargs", {}).pop(name, None)
        construct(*given.args, **given.kwargs)
        fuse(self, backend)

    return build


def _package(module: str) -> Any:
    import importlib

    return importlib.import_module(f"x_transformers.{module}")


@cache
def _swaps() -> dict[type, type]:
    """The package's classes and what stands in for them, made once, for they derive from the package's."""
    attend, layers = _package("attend"), _package("x_transformers")
    _Attend.record = _over(Intermediates, attend.Intermediates)
    _Attention.alibi = layers.AlibiPositionalBias
    _Attend.package = attend
    return {attend.Attend: _over(_Attend, attend.Attend), layers.Attention: _over(_Attention, layers.Attention)}


@cache
def _sums() -> dict[type, type]:
    """What stands in for the package's class where its bias can be added inside the kernels."""
    plain = _package("x_transformers").DataDependentAlibi
    return {plain: _over(_DataDependentAlibi, plain)}


def _over(ours: type, base: type) -> type:
    """A class of the package with one of ours laid over it, among this module's names, where pickle looks for it."""
    name = f"Fused{base.__name__}"
    made = type(name, (ours, base), {"__module__": __name__, "__doc__": f"The package's ``{base.__name__}`` on this package's attention."})
    globals()[name] = made
    return made


def __getattr__(name: str) -> Any:
    """Makes the classes when a pickle asks for one of them first."""
    if name in ("FusedIntermediates", "FusedAttend", "FusedAttention", "FusedDataDependentAlibi"):
        _swaps(), _sums()
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_SUMS = "attn_bias holds sums of log-forget-gates"


class _Attend(own.Attend):
    package: ClassVar[Any]
    attn_fn: Any

    @property  # read at each call, for the function may be set after the model was fused
    def normalizer(self) -> Normalizer | None:  # type: ignore[override]
        return _normalizer(self.package, self.attn_fn, self.inverted_attention)[0]

    @property
    def custom_attn_fn(self) -> Any:  # type: ignore[override]
        return _normalizer(self.package, self.attn_fn, self.inverted_attention)[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Intermediates]:
        if _SUMS in (kwargs.get("flash_pack_seq_kwargs") or ()):
            kwargs |= {"attn_bias": _forgetting(kwargs["attn_bias"]), "flash_pack_seq_kwargs": None}
        prev = kwargs.get("prev_attn")
        if prev is not None and self.head_attn_sink is not None and prev.shape[-1] == k.shape[2] + self.add_zero_kv + 1:
            kwargs["prev_attn"] = prev[..., 1:]  # the sinks' column is no key's
        return super().forward(q, k, v, *args, **kwargs)


class _Attention(nn.Module):
    """What is laid over the package's class: biases as modifications, and no cache where scores need all queries."""

    alibi: ClassVar[type]
    attend: own.Attend
    num_mem_kv: int
    data_dependent_alibi: nn.Module | None
    rel_proj_pos_bias: nn.Module | None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cache") is not None and (self.attend.selective or self.data_dependent_alibi is not None):
            kind = "selective attention" if self.attend.selective else "data_dependent_alibi"
            raise ValueError(
                f"cache must be None with {kind}, which needs the scores or gates of all earlier queries; got a cache. "
                "Decode without one, as the package's own wrapper does where can_cache_kv is False."
            )
        if isinstance(self.data_dependent_alibi, _DataDependentAlibi):
            # The one keyword that the package hands to Attend as it is; what a caller packs is refused there.
            kwargs.setdefault("flash_pack_seq_kwargs", None)
            kwargs["flash_pack_seq_kwargs"] = kwargs["flash_pack_seq_kwargs"] or {_SUMS: True}
        elif self.data_dependent_alibi is None and self.rel_proj_pos_bias is None and isinstance(self.attend, own.Attend):
            kwargs = self._with_alibi(kwargs)
        return super().forward(x, *args, **kwargs)

    def _with_alibi(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keywords with ALiBi as a modification."""
        alibi: Any = kwargs.get("rel_pos")
        is_plain = isinstance(alibi, self.alibi) and kwargs.get("pos") is None and not self.num_mem_kv
        if is_plain and kwargs.get("attn_bias") is None:
            slopes = alibi.slopes[:, 0, 0]
            return {**kwargs, "rel_pos": None, "attn_bias": (ALiBi(pad(slopes, (0, alibi.total_heads - len(slopes)))),)}
        return kwargs


class _DataDependentAlibi(nn.Module):
    """What is laid over the package's class: sums of log-forget-gates [batch, heads, length, 1] instead of their differences."""

    to_forget_gates: nn.Module
    post_log_scale: float

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.to_forget_gates(x) * self.post_log_scale
        return gates.cumsum(-1)[..., None]


def _forgetting(sums: Tensor) -> tuple[ScoreMod, ...]:
    """c_i - c_j of sums c [batch, heads, length, front + 1]: in the kernels, or an array where memories stand in front of the keys."""
    c, front = sums[..., -1], sums.shape[-1] - 1
    return (Bias(pad(c[..., :, None] - c[..., None, :], (front, 0))),) if front else (DecayBias(c),)


def _sums_of(layer: Any) -> None:
    """Lets a causal forgetting bias reach ``Attend`` as sums, where nothing else is added to it on its way."""
    bias = layer.data_dependent_alibi
    if type(bias) in _sums() and bias.causal and layer.rel_proj_pos_bias is None and type(layer.attend) in _swaps().values():
        bias.__class__ = _sums()[type(bias)]


_COULD_CACHE = "_could_cache_kv"


def _cache_if_possible(module: nn.Module) -> None:
    """Lets wrappers decode without a cache where a layer inside refuses one."""
    forgets = any(isinstance(m, _Attention) and m.data_dependent_alibi is not None for m in module.modules())
    if forgets and module.__dict__.get("can_cache_kv"):
        module.__dict__.update({"can_cache_kv": False, _COULD_CACHE: True})


def _normalizer(package: Any, function: Any, inverted: bool) -> tuple[Normalizer | None, Any]:
    """What makes weights of scores; or the function itself where it is not exactly one that the package makes."""
    if function is functional.sigmoid or function is torch.sigmoid:
        return Sigmoid(), None
    if not isinstance(function, partial) or function.args:
        return None, function
    called, options = function.func, dict(function.keywords)
    if options.pop("dim", None) != (-2 if inverted else -1):
        return None, function
    names = set(options)
    if called is functional.softmax and (not names or options == {"dtype": torch.float32}):
        return None, None
    if called is package.one_hot_straight_through and not names:
        return Hard(), None
    if called is package.sparse_topk_attn and names == {"sparse_topk", "straight_through"}:
        return TopK(options["sparse_topk"], options["straight_through"]), None
    if called is functional.gumbel_softmax and names == {"tau", "hard"}:
        return Gumbel(options["tau"], options["hard"]), None
    return None, function


def _keep_scores(layers: Any) -> None:
    """Residual attention (RealFormer) reads every layer's scores: they come with the layer's own pass instead of one more."""
    for kind, (_, block, _) in zip(layers.layer_types, layers.layers, strict=True):
        if kind in ("a", "c") and type(getattr(block, "attend", None)) in _swaps().values():
            block.attend.keeps_scores = bool(layers.residual_attn if kind == "a" else layers.cross_residual_attn)
