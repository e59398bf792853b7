"""Tensors that lie against a page which nobody may touch: a byte read or written outside of them ends the process."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

_PAGE = mmap.PAGESIZE
_PROTECTED, _PRIVATE_ANONYMOUS = 0, 0x22


class _Room:
    """Pages between two that may not be touched; they are given back with the object."""

    def __init__(self, size: int) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.length = (-(-size // _PAGE) + 2) * _PAGE
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
        self.libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        self.base = self.libc.mmap(None, self.length, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_ANONYMOUS, -1, 0)
        for page in (self.base, self.base + self.length - _PAGE):
            assert self.libc.mprotect(page, _PAGE, _PROTECTED) == 0

    def __del__(self) -> None:
        self.libc.munmap(self.base, self.length)


def _bytes(size: int, at_end: bool) -> Any:
    """Bytes of a room as a buffer, which keeps it alive."""
    room = _Room(size)
    buffer = (ctypes.c_char * size).from_address(room.base + (room.length - _PAGE - size if at_end else _PAGE))
    buffer.room = room
    return buffer


def guarded(like: Tensor, at_end: bool = True) -> Tensor:
    """The values of a contiguous tensor in memory whose end (or beginning) is that of a page, with a forbidden one beyond."""
    size = like.numel() * like.element_size()
    if size == 0:
        return like
    return torch.frombuffer(_bytes(size, at_end), dtype=like.dtype).view(like.shape).copy_(like)


@contextmanager
def guarded_results(monkeypatch: pytest.MonkeyPatch, at_end: bool) -> Iterator[None]:
    """Inside, contiguous tensors that torch is asked for without values lie against a forbidden page as well."""

    def moved(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_guarded(*args: Any, **kwargs: Any) -> Tensor:
            tensor = allocate(*args, **kwargs)
            return guarded(tensor, at_end) if tensor.device.type == "cpu" and tensor.is_contiguous() else tensor

        return allocate_guarded

    with monkeypatch.context() as patch:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_zeros"))):
            for name in names:
                patch.setattr(owner, name, moved(getattr(owner, name)))
        yield
