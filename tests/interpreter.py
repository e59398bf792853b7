"""Triton's interpreter without what it does again and again: the same operations on the same numbers in a fraction of the time.

It makes every scalar and every block's type anew for every operation, although they follow from the types of the operands. Everything here
keeps what the interpreter itself computed, so that a result cannot depend on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


def quicken() -> None:
    """For this process; before the first kernel is interpreted."""
    from triton import language
    from triton.runtime import interpreter

    interpreter.InterpretedFunction.__call__ = _patching_once(interpreter)
    interpreter._get_np_dtype = _kept_numbers(interpreter._get_np_dtype)
    language.block_type.__init__ = _kept_blocks(language.block_type.__init__)
    language.core.tensor.__init__ = _kept_tensors(language.core.tensor.__init__)
    semantic = type(interpreter.interpreter_semantic)
    semantic.broadcast_impl_value = _broadcasting_where_needed(semantic.broadcast_impl_value)
    # The check of integers is computed and then dropped, since assertions are off ("debug").
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _patching_once(interpreter: Any) -> Callable[..., Any]:
    """The language module is patched anew for every call of a device function, which takes more than half of the interpreter's time; the
    kernel's own patch is in force by then, so once per module of device functions is enough."""
    patched: set[int] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    return call


def _kept_numbers(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """NumPy's type for a type, kept in the type."""

    def find(of: Any) -> Any:
        kept = of.__dict__
        if "_kept_numbers" not in kept:
            kept["_kept_numbers"] = original(of)
        return kept["_kept_numbers"]

    return find


def _kept_blocks(original: Callable[..., None]) -> Callable[..., None]:
    """A block's type, kept in that of its elements: all blocks of a shape are one, with one dictionary of attributes."""

    def create(self: Any, element_ty: Any, shape: Any) -> None:
        kept = element_ty.__dict__.setdefault("_kept_blocks", {})
        key = tuple(shape)
        if key not in kept:
            original(self, element_ty, shape)
            self._kept_shape = tuple(self.shape)
            kept[key] = self.__dict__
        self.__dict__ = kept[key]

    return create


def _kept_tensors(original: Callable[..., None]) -> Callable[..., None]:
    """Of a tensor, all but the handle, kept in its type."""

    def create(self: Any, handle: Any, type: Any) -> None:
        kept = type.__dict__
        if "_kept_tensor" not in kept:
            original(self, handle, type)
            kept["_kept_tensor"] = {name: value for name, value in self.__dict__.items() if name != "handle"}
        self.__dict__.update(kept["_kept_tensor"], handle=handle)

    return create


def _broadcasting_where_needed(original: Callable[..., Any]) -> Callable[..., Any]:
    """Two scalars and two blocks of one shape stay as they are."""

    def broadcast(self: Any, lhs: Any, rhs: Any) -> Any:
        if lhs.type.__dict__.get("_kept_shape") == rhs.type.__dict__.get("_kept_shape"):
            return lhs, rhs
        return original(self, lhs, rhs)

    return broadcast
