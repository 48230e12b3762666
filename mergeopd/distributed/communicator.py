"""Collectives between the processes of a run. Importing this does not import torch.

Cheap work is replicated on every rank. Expensive work is sharded over ranks (`run_and_gather`) and gathered,
so that all ranks end with the same state. Objects are pickled, but only between processes of one run.
"""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from mergeopd.distributed.exchange import HEAD_BYTES, Packed, size_of, steps, unpacked, unpacked_head
from mergeopd.errors import PeerFailed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")

# Objects are sent in parts of about this size, for which each process needs memory beside what it receives.
PART_BYTES = 64 << 20


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
        own = Packed.of(value)
        heads = self._gather_heads(own.head)
        contents = self._exchange(own, [size_of(head) for head in heads])
        return [
            own.own() if rank == self.rank else _of_other(head, content)
            for rank, (head, content) in enumerate(zip(heads, contents, strict=True))
        ]

    def run_on_first(self, work: Callable[[], T]) -> T:
        import torch.distributed as dist

        outcome: tuple[T | None, type[Exception] | None] = (None, None)
        failure = None
        if self.is_first:
            self.outside_collective = True
            try:
                outcome = work(), None
            except Exception as error:  # noqa: BLE001 - raised below, when the others know
                failure, outcome = error, (None, _kind(error))
            finally:
                self.outside_collective = False
        own = Packed.of(outcome)
        row = _row(own.head)
        dist.broadcast(row, src=0)
        head = row.numpy().tobytes()
        content, *_ = self._exchange(own, [size_of(head), *(0 for _ in range(1, self.size))])
        if failure is not None:
            raise failure
        value, kind = own.own() if self.is_first else _of_other(head, content)
        if kind is not None:
            raise kind()
        return cast(T, value)

    def _gather_heads(self, head: bytes) -> list[bytes]:
        """Return the heads of all processes. Through the first one: a ring has a hop for each process."""
        import torch
        import torch.distributed as dist

        every = torch.zeros((self.size, HEAD_BYTES), dtype=torch.uint8)
        dist.gather(_row(head), list(every) if self.is_first else None, dst=0)
        dist.broadcast(every, src=0)
        return [row.numpy().tobytes() for row in every]

    def _exchange(self, own: Packed, sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
        """Return the bytes of every process, whose numbers are `sizes`; empty for this one. Collective."""
        import numpy as np
        import torch
        import torch.distributed as dist

        contents = [np.empty(0 if r == self.rank else size, np.uint8) for r, size in enumerate(sizes)]
        for step in steps(sizes, PART_BYTES):
            span = slice(step.start, step.start + step.num_bytes)
            if step.sender is None:
                part = np.empty(step.num_bytes, np.uint8)
                parts = np.empty((self.size, step.num_bytes), np.uint8)
                own.copy_to(part, step.start)
                all_gather(torch.from_numpy(parts).view(-1), torch.from_numpy(part))
                for content, received in zip(contents, parts, strict=True):
                    content[span] = received[: len(content[span])]
            else:
                part = contents[step.sender][span]
                if step.sender == self.rank:
                    part = np.empty(step.num_bytes, np.uint8)
                    own.copy_to(part, step.start)
                dist.broadcast(torch.from_numpy(part), src=step.sender)
        return contents

    def run_and_gather(self, work: Callable[[], T]) -> list[T]:
        self.outside_collective = True
        try:
            value = work()
        except Exception as error:
            self.outside_collective = False
            for _, peer in self.gather((None, _kind(error))):
                if isinstance(error, PeerFailed) and peer not in (None, PeerFailed):
                    raise peer() from error  # what the peer raised
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


def all_gather(whole: Tensor, own: Tensor) -> None:
    """Fill `whole` with the `own` of all ranks, of equal size, by rank. Collective of the default group."""
    import torch.distributed as dist

    # The same function: torch 2.13 deprecates the second name, which is the only one in earlier versions.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(whole, own)


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


def _kind(error: Exception) -> type[Exception]:
    """Return what other processes raise when this one fails with an error."""
    return type(error) if isinstance(error, CollectiveAbort) else PeerFailed


def _of_other(head: bytes, content: NDArray[np.uint8]) -> Any:
    return unpacked(content.data) if len(content) else unpacked_head(head)


def _row(head: bytes) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(head), dtype=torch.uint8)
