"""What ranks send each other: point to point and all to all, counted, with errors that say who waited for whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank has sent to others.

    Args:
        sent: bytes.
        messages: tensors, one for each receiver.
    """

    sent: int = 0
    messages: int = 0


# Autograd runs backward in threads of its own, which see no context variables of the caller.
_everywhere: list[Traffic] = []


@contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what this process sends within the block, backward passes included.

    Example:
        >>> with counted() as traffic:
        ...     pass
        >>> traffic
        Traffic(sent=0, messages=0)
    """
    traffic = Traffic()
    _everywhere.append(traffic)
    try:
        yield traffic
    finally:
        _everywhere.remove(traffic)


def _count(tensor: Tensor) -> None:
    for traffic in _everywhere:
        traffic.sent += tensor.numel() * tensor.element_size()
        traffic.messages += 1


def as_group(group: Any) -> Any:
    """A process group of a group, of a mesh with one dimension, or of None, the default group.

    Raises:
        TypeError: it is none of these.
        ValueError: the mesh has several dimensions, or torch.distributed is not initialised.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "torch.distributed must be initialised; got no process group. Call torch.distributed.init_process_group(...) first."
        )
    if group is None:
        return dist.group.WORLD
    if isinstance(group, dist.ProcessGroup):
        return group
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(group, DeviceMesh):
        raise TypeError(
            f"group must be a process group, a DeviceMesh or None; got {type(group).__name__}. Pass mesh['cp'], or None for all ranks."
        )
    if group.ndim != 1:
        raise ValueError(f"a mesh must have one dimension here; got {group.ndim}: {group.mesh_dim_names}. Pass one of them, as mesh['cp'].")
    return group.get_group()


@dataclass
class Exchange:
    """Messages on their way.

    Args:
        works: what to wait for.
        received: tensors that are filled in then.
        kept: tensors that must live until then.
        who: whom this rank waits for, for errors.
    """

    works: Sequence[Any]
    received: tuple[Tensor, ...]
    kept: tuple[Tensor, ...]
    who: str

    def wait(self) -> tuple[Tensor, ...]:
        """What has arrived.

        Raises:
            RuntimeError: another rank failed, or did not come within the group's timeout.
        """
        for work in self.works:
            with _named(self.who):
                work.wait()
        return self.received


@contextmanager
def _named(who: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"every rank of the group must take part until the call and its backward end; got, {who}: {error}. "
            "Look for that rank's own error, which came first."
        ) from error


def post(group: Any, to: tuple[int, Sequence[Tensor]] | None, source: tuple[int, Sequence[Tensor]] | None) -> Exchange:
    """Sends tensors to a rank and receives from a rank into room like the given ones, neither of which it waits for.

    Args:
        group: the process group; ranks are those within it.
        to: whom, and what; None to send nothing.
        source: from whom, and tensors of the shapes and dtypes that come; None to receive nothing.
    """
    rank, operations = dist.get_rank(group), []
    sent = () if to is None else tuple([t.contiguous() for t in to[1]])
    received = () if source is None else tuple([torch.empty_like(t, memory_format=torch.contiguous_format) for t in source[1]])
    for peer, tensors, function in ((to, sent, dist.isend), (source, received, dist.irecv)):
        if peer is not None:
            whole = dist.get_global_rank(group, peer[0])
            operations += [dist.P2POp(function, t, whole, group) for t in tensors]
    for tensor in sent:
        _count(tensor)
    who = f"rank {rank} with rank {'-' if to is None else to[0]} (sending) and {'-' if source is None else source[0]} (receiving)"
    with _named(who):
        works = dist.batch_isend_irecv(operations) if operations else []
    return Exchange(works, received, sent, who)


def told(group: Any, numbers: Sequence[int]) -> list[list[int]]:
    """The numbers of all ranks, which each is told on the host; not counted."""
    rank, sending = dist.get_rank(group), torch.tensor(numbers, device="cpu")
    received = [torch.empty_like(sending) for _ in range(dist.get_world_size(group))]
    with _named(f"rank {rank} with all ranks"):
        dist.all_gather(received, sending, group=group)
    result: list[list[int]] = torch.stack(received).tolist()
    return result


def all_to_all(group: Any, parts: Sequence[Tensor]) -> list[Tensor]:
    """The i-th part to rank i; what each rank has for this one, all parts of one shape and dtype."""
    rank = dist.get_rank(group)
    sending = torch.stack([p.contiguous() for p in parts])
    received = torch.empty_like(sending)
    for place, part in enumerate(sending):
        if place != rank:
            _count(part)
    with _named(f"rank {rank} with all ranks"):
        dist.all_to_all_single(received, sending, group=group)
    return list(received.unbind())


def gathered(group: Any, tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks, all of one shape and dtype."""
    rank, sending = dist.get_rank(group), tensor.contiguous()
    received = [torch.empty_like(sending) for _ in range(dist.get_world_size(group))]
    for place in range(len(received)):
        if place != rank:
            _count(sending)
    with _named(f"rank {rank} with all ranks"):
        dist.all_gather(received, sending, group=group)
    return received
