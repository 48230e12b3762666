"""Collectives between the processes of a run. Importing this does not import torch.

Cheap work is replicated on every rank. Expensive work is sharded over ranks (`run_and_gather`) and gathered,
so that all ranks end with the same state. Objects are pickled, but only between processes of one run.
"""

from __future__ import annotations

import os
import pickle
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mergeopd.errors import PeerFailed

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# Arrays are sent in parts of about this size: the sender needs memory for a second copy of one part only.
_PART_BYTES = 16 << 20
_ALIGNMENT = 8


class CollectiveAbort(Exception):  # noqa: N818 (control flow, not an error)
    """Base of exceptions that, raised on one rank in a collective, are raised on all ranks.

    Subclasses are constructed without arguments.
    """


class Communicator(ABC):
    """The processes of a run, and collectives between them.

    `machines` has a name for every rank, equal for ranks on the same machine. `outside_collective` is True
    while this rank is outside a collective and may raise without deadlocking the others.
    """

    rank: int
    size: int
    machines: tuple[str, ...]
    outside_collective: bool

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def num_local(self) -> int:
        """Number of processes on this machine."""
        return self.machines.count(self.machines[self.rank])

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on all ranks. Tensors must be on the CPU. Collective.

        The contents of numpy arrays are not copied where they are this process's own, are read-only, and
        travel as bytes beside the rest, which is pickled.
        """

    def run_on_first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and return its result on all ranks. Collective.

        If it raises a `CollectiveAbort`, the other ranks raise it too; for other exceptions, PeerFailed.
        """
        first, *_ = self.run_and_gather(lambda: work() if self.is_first else None)
        return cast(T, first)

    @abstractmethod
    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank and return all results, by rank, on all ranks. Collective.

        `work` must not be collective, except in ways that end on all ranks when it raises on one. If it
        raises on one rank, the other ranks raise as in `run_on_first`.
        """

    @abstractmethod
    def send(self, tensor: Tensor, rank: int) -> None:
        """Send a tensor to another rank, which must call `receive`."""

    @abstractmethod
    def receive(self, tensor: Tensor, rank: int) -> None:
        """Receive a tensor from another rank into a contiguous tensor."""


class SingleProcess(Communicator):
    """Communicator of a run with one process."""

    rank = 0
    size = 1
    machines: tuple[str, ...] = ("",)
    outside_collective = True

    def gather(self, value: T) -> list[T]:
        return [value]

    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        return [work()]

    def send(self, tensor: Tensor, rank: int) -> None:
        raise ValueError(f"rank {rank} does not exist: this is the only process")

    receive = send


class TorchCommunicator(Communicator):
    """Communicator over torch's default process group, which must be initialised (gloo for CPU tensors).

    `machine` is the name of this process's machine.
    """

    def __init__(self, machine: str) -> None:
        import torch.distributed as dist

        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.outside_collective = False
        self.machines: tuple[str, ...] = ()
        self.machines = tuple(self.gather(machine))

    def gather(self, value: T) -> list[T]:
        import torch.distributed as dist

        buffers: list[pickle.PickleBuffer] = []
        rest = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        own = [buffer.raw() for buffer in buffers]
        pickles: list[Any] = [None] * self.size
        dist.all_gather_object(pickles, (rest, [buffer.nbytes for buffer in own]))
        return [
            # From a process of this run, and torch itself has unpickled the list.
            pickle.loads(rest, buffers=list(self._broadcast(rank, own, sizes)))  # noqa: S301
            for rank, (rest, sizes) in enumerate(pickles)
        ]

    def _broadcast(self, rank: int, own: Sequence[memoryview], sizes: Sequence[int]) -> Iterator[memoryview]:
        """Yield the buffers of process `rank`, whose `own` they are, as read-only bytes. Collective."""
        import numpy as np
        import torch
        import torch.distributed as dist

        for part in _parts(sizes):
            starts = [0, *accumulate(sizes[i] + -sizes[i] % _ALIGNMENT for i in part)]
            content = np.empty(starts[-1], np.uint8)
            if rank == self.rank:
                for i, start in zip(part, starts, strict=False):
                    content[start : start + sizes[i]] = np.frombuffer(own[i], np.uint8)
            if len(content):
                dist.broadcast(torch.from_numpy(content), src=rank)
            if rank == self.rank:
                yield from (own[i].toreadonly() for i in part)
            else:
                read_only = content.data.toreadonly()
                yield from (read_only[s : s + sizes[i]] for i, s in zip(part, starts, strict=False))

    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        self.outside_collective = True
        try:
            value = work()
        except Exception as error:
            self.outside_collective = False
            own: tuple[Any, Any] = (None, type(error) if isinstance(error, CollectiveAbort) else PeerFailed)
            for _, kind in self.gather(own):
                if isinstance(error, PeerFailed) and kind not in (None, PeerFailed):
                    raise kind() from error  # what the peer raised
            raise
        finally:
            self.outside_collective = False
        outcomes = self.gather((value, None))
        for _, kind in outcomes:
            if kind is not None:
                raise kind()
        return [value for value, _ in outcomes]

    def send(self, tensor: Tensor, rank: int) -> None:
        import torch.distributed as dist

        dist.send(tensor, dst=rank)

    def receive(self, tensor: Tensor, rank: int) -> None:
        import torch.distributed as dist

        dist.recv(tensor, src=rank)


def this_machine() -> str:
    """Return the name of this machine: host name, boot id and process namespace."""
    parts = [socket.gethostname()]
    boot = Path("/proc/sys/kernel/random/boot_id")
    if boot.is_file():
        parts += [boot.read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def scatter_gather(
    ranks: Communicator, items: Sequence[T], work: Callable[[Sequence[T]], Sequence[R]]
) -> list[R]:
    """Distribute `items`, equal on all ranks, over ranks; return all results, in order, on all ranks.

    `work` returns one result per item of its share, which may be empty. Collective.
    """
    shares = ranks.run_and_gather(lambda: work(items[ranks.rank :: ranks.size]))
    return [shares[position % ranks.size][position // ranks.size] for position in range(len(items))]


def _parts(sizes: Sequence[int]) -> Iterator[range]:
    """Yield ranges of consecutive indices whose sizes reach `_PART_BYTES` together."""
    start = total = 0
    for i, size in enumerate(sizes):
        total += size
        if total >= _PART_BYTES or i + 1 == len(sizes):
            yield range(start, i + 1)
            start, total = i + 1, 0
