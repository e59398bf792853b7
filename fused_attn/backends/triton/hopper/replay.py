"""Calls that differ in their tensors alone are launched as the first of them was: its arguments are kept, and addresses put in.

Making a forward's arguments takes Python 0.1 to 0.3 ms, as long as the chip takes for 2048 keys of a few heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch
from .descriptors import Tiles, arguments_at

# An argument made of the call's tensors.
_Make = Callable[[Sequence[Tensor]], Any]


class _Launch(NamedTuple):
    """A compiled kernel, its grid, its arguments without the call's tensors, and what makes those: (place, function of the tensors)."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: list[Any]
    makes: list[tuple[int, _Make]]


class Recording:
    """Launches of one call.

    Args:
        tensors: all that its kernels read and write, each at an address of its own.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.device = tensors[0].device
        self._at = {t.data_ptr(): i for i, t in enumerate(tensors)}
        self._launches: list[_Launch] = []
        # Whether there is nothing else that a later call would have to make anew.
        self.whole = len(self._at) == len(tensors)

    def start(self, kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], num_warps: int, num_stages: int | None = None) -> None:
        """``launch.start``, kept."""
        x, y, z = (*grid, 1, 1)[:3]
        compiled = launch.start(kernel, (x, y, z), self.device, args, num_warps, num_stages)
        metas, flat, makes = iter(compiled.metas), list[Any](), list[tuple[int, _Make]]()
        for value in args:
            make = self._make(value, next(metas)) if isinstance(value, Tiles) else self._make(value)
            if make is not None:
                makes.append((len(flat), make))
            if isinstance(value, Tiles):
                flat += [None, *value.descriptor().shape, *value.descriptor().strides]
            else:
                flat.append(value if make is None else None)
        self._launches.append(_Launch(compiled.kernel, (x, y, z), flat, makes))

    def of(self, kernel: Any) -> _Plain:
        """A plain kernel that ``Plan.launch`` starts through this recording."""
        return _Plain(self, kernel)

    def _make(self, value: Any, meta: Any = None) -> _Make | None:
        """What makes an argument of later tensors; None for one that stays."""
        if isinstance(value, Tiles):
            # No function may hold a tensor.
            place, dtype, sizes, strides = self._place(value.tensor), value.tensor.dtype, tuple(value.tensor.shape), value.tensor.stride()
            rest = (dtype, sizes, strides, value.box, value.swizzled, meta)
            return lambda tensors: arguments_at(tensors[place].data_ptr(), *rest)[0]
        if isinstance(value, Tensor):
            place = self._place(value)
            return lambda tensors: tensors[place]
        if isinstance(value, tuple):
            inner = [(i, make) for i, v in enumerate(value) if (make := self._make(v)) is not None]
            if inner:
                kind, made = type(value), {i for i, _ in inner}
                others = [None if i in made else v for i, v in enumerate(value)]
                return lambda tensors: _filled(kind, others, inner, tensors)
        return None

    def _place(self, tensor: Tensor) -> int:
        found = self._at.get(tensor.data_ptr())
        self.whole = self.whole and found is not None
        return found or 0

    def run(self, tensors: Sequence[Tensor]) -> None:
        """The same launches on other tensors, in the order of the first ones and with their sizes and strides."""
        with torch.cuda.device(self.device):
            for kernel, grid, arguments, makes in self._launches:
                args = arguments.copy()
                for place, make in makes:
                    args[place] = make(tensors)
                kernel[grid](*args)


# A model has few kinds of calls; lengths that never repeat keep nothing for ever.
MOST_KEPT = 1024


def again(kept: dict[Any, Recording], key: Any, tensors: Sequence[Tensor], start: Callable[[Recording], None]) -> None:
    """Launches what was kept under a key, or lets ``start`` launch through a recording, which is kept from then on.

    Args:
        kept: recordings by what decides a call's launches but its tensors' addresses.
        key: this call's.
        tensors: all that its kernels read and write.
        start: makes the launches of a call whose key is new.
    """
    found = kept.get(key)
    if found is not None:
        found.run(tensors)
        return
    recording = Recording(tensors)
    start(recording)
    if recording.whole and len(kept) < MOST_KEPT:
        kept[key] = recording


class _Plain(NamedTuple):
    """Stands for a jitted kernel."""

    recording: Recording
    kernel: Any

    def __getitem__(self, grid: Any) -> Any:
        def start(*args: Any, num_warps: int, num_stages: int | None = None, enable_fp_fusion: bool) -> None:
            self.recording.start(self.kernel, grid, args, num_warps, num_stages)

        return start


def _filled(kind: Any, others: list[Any], makes: list[tuple[int, _Make]], tensors: Sequence[Tensor]) -> Any:
    values = others.copy()
    for i, make in makes:
        values[i] = make(tensors)
    return kind(*values) if hasattr(kind, "_fields") else kind(values)
