"""Cache of a round's hidden states shared by several processes: one copy on every machine that needs it.

Every process appends the states that it computed to its own unnamed files: one in memory, one on disk for
what exceeds the budget. Other processes of the machine open them through /proc, so the size of /dev/shm does
not matter, and the files are deleted with the processes, however they end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, cast

import torch
from torch import Tensor

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures

# Maximum bytes per message to another machine; a larger rollout is sent alone.
_PARCEL_BYTES = 64 << 20

_Key = tuple[str, int]  # teacher, rollout


@dataclass(frozen=True, slots=True)
class _SpillSlot:
    """Location of hidden states in `file`, which every process of its machine can open."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


_Entry = tuple[_Key, _SpillSlot]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """One message between two processes: the concatenated bytes of `entries`."""

    sender: int
    receiver: int
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(place.num_bytes for _, place in self.entries)


class SharedHiddenCache:
    """Last hidden states of trained response tokens, by teacher and rollout, for the processes of a run.

    `loss_ranks(rollout)` returns the ranks that will gather a rollout, the same on every rank. The machine
    holds at most `budget_bytes` in memory, divided equally among its processes; the rest is spilled to a file
    in `folder`, bit for bit. `num_bytes` and `num_spilled_bytes` count the bytes that this process holds in
    memory and on disk, for itself and others. `gather` returns tensors on `device`.

    A context manager: memory and disk are freed when all processes of the machine have left. They may leave
    at any time after the last `publish`. Linux only: StorageError elsewhere.
    """

    def __init__(
        self,
        budget_bytes: int,
        folder: Path,
        ranks: Communicator,
        loss_ranks: Callable[[int], Collection[int]],
        device: torch.device,
    ) -> None:
        if not hasattr(os, "memfd_create"):
            raise StorageError(
                "several processes share hidden states through Linux's memory files, which this system does "
                "not have; run on Linux, or in one process"
            )
        self._budget_bytes = budget_bytes // ranks.num_local
        self._folder = folder
        self._ranks = ranks
        self._loss_ranks = loss_ranks
        self._device = device
        self._memory: _GrowingFile | None = None
        self._disk: _GrowingFile | None = None
        self._fresh: dict[_Key, _SpillSlot] = {}
        self._scorers: dict[_Key, int] = {}
        self._places: dict[_Key, _SpillSlot] = {}
        self._opened: dict[str, int] = {}
        self._open_files = ExitStack()
        self.num_bytes = 0
        self.num_spilled_bytes = 0

    def __enter__(self) -> SharedHiddenCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._fresh.clear()
        self._places.clear()
        self._opened.clear()
        with suppress(OSError):  # a full disk was reported by the write; the data is no longer needed
            self._open_files.close()

    def put(self, teacher: str, rollout: int, hidden: Tensor) -> None:
        """Keep `[trained tokens, d_T]` for one rollout (its index in the round). Not collective.

        Raises KeyError when it is there already, StorageError when memory or the disk fails.
        """
        key = (teacher, rollout)
        if key in self._scorers or key in self._fresh:
            raise KeyError(f"teacher {teacher!r} has already scored rollout {rollout}")
        self._fresh[key] = self._keep(_bytes_of(hidden.cpu().contiguous()), tuple(hidden.shape), hidden.dtype)

    def publish(self) -> None:
        """Make what was put since the last call available to all loss ranks. Collective, after every pass.

        Each rollout is sent once to every other machine that needs it, to the lowest of its loss ranks.
        Raises KeyError on all ranks when two have scored the same rollout; StorageError on the rank whose
        memory or disk fails, and PeerFailed on the others.
        """
        scored = self._ranks.gather(tuple(self._fresh.items()))
        self._fresh = {}
        for rank, entries in enumerate(scored):
            for (teacher, rollout), _ in entries:
                first = self._scorers.setdefault((teacher, rollout), rank)
                if first != rank:
                    raise KeyError(
                        f"teacher {teacher!r} has already scored rollout {rollout} on rank {first}"
                    )
        told = [scored]
        parcels = self._parcels(scored)
        if parcels:
            relayed, failure = self._exchange(parcels)
            told.append(self._ranks.run_and_gather(lambda: _unless(failure, relayed)))
        machines, rank = self._ranks.machines, self._ranks.rank
        mine = [
            (key, place)
            for by_rank in told
            for machine, entries in zip(machines, by_rank, strict=True)
            if machine == machines[rank]
            for key, place in entries
            if rank in self._loss_ranks(key[1])
        ]
        # The collective returns once every file is open, so that its owner may close it.
        self._ranks.run_and_gather(lambda: self._open(place.file for _, place in mine))
        self._places.update(mine)

    def gather(self, teacher: str, rollouts: Sequence[int]) -> Tensor:
        """`[sum of their trained tokens, d_T]` in the order of `rollouts`, on this cache's device.

        Raises KeyError for a rollout that was not published for this rank.
        """
        places = []
        for rollout in rollouts:
            if (teacher, rollout) not in self._places:
                raise KeyError(
                    f"no hidden states of teacher {teacher!r} for rollout {rollout} were published for "
                    f"rank {self._ranks.rank}"
                )
            places.append(self._places[teacher, rollout])
        kinds = {(place.shape[1:], place.dtype) for place in places}
        if len(kinds) != 1:
            raise ValueError(f"hidden states of teacher {teacher!r} are of {len(kinds)} kinds: {kinds}")
        ((width, dtype),) = kinds
        gathered = torch.empty((sum(place.shape[0] for place in places), *width), dtype=dtype)
        self._read(places, _bytes_of(gathered))
        return gathered.to(self._device)

    def _keep(self, data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> _SpillSlot:
        """Append to the memory file within the budget, else to the one on disk."""
        if self.num_bytes + len(data) <= self._budget_bytes:
            file, offset = self._keep_in_memory(data)
            self.num_bytes += len(data)
        else:
            with named_failures("spill hidden states to", self._folder):
                if self._disk is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    nameless = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed by __exit__
                    self._disk = _GrowingFile(self._open_files.enter_context(cast(BinaryIO, nameless)))
                file, offset = self._disk.path, self._disk.append(data)
            self.num_spilled_bytes += len(data)
        return _SpillSlot(file, offset, shape, dtype)

    def _keep_in_memory(self, data: memoryview) -> tuple[str, int]:
        try:
            if self._memory is None:
                nameless = os.fdopen(os.memfd_create("hidden states"), "r+b", buffering=0)
                self._memory = _GrowingFile(self._open_files.enter_context(cast(BinaryIO, nameless)))
            return self._memory.path, self._memory.append(data)
        except OSError as error:
            raise StorageError(
                f"cannot keep {len(data)} more bytes of hidden states in memory besides {self.num_bytes}: "
                f"{error.strerror}; lower `memory: {{hidden_states_gib: ...}}`, "
                "then run the same command again"
            ) from error

    def _parcels(self, told: Sequence[Sequence[_Entry]]) -> list[_Parcel]:
        """Return all messages between machines, the same list on every rank.

        Every rank processes its messages in this order, which prevents deadlocks. Messages to the next rank
        come first, then those to the one after it, so that many pairs transfer at the same time.
        """
        wanted: dict[tuple[int, int], list[_Entry]] = {}
        for sender, entries in enumerate(told):
            for key, place in entries:
                for receiver in self._relays(key[1], sender):
                    wanted.setdefault((sender, receiver), []).append((key, place))
        order = sorted(wanted, key=lambda pair: ((pair[1] - pair[0]) % self._ranks.size, pair[0]))
        return [_Parcel(*pair, batch) for pair in order for batch in _batches(wanted[pair])]

    def _relays(self, rollout: int, sender: int) -> Collection[int]:
        """Return the lowest loss rank of this rollout on every other machine."""
        machines = self._ranks.machines
        lowest: dict[str, int] = {}
        for reader in sorted(self._loss_ranks(rollout)):
            lowest.setdefault(machines[reader], reader)
        lowest.pop(machines[sender], None)
        return lowest.values()

    def _exchange(self, parcels: Sequence[_Parcel]) -> tuple[tuple[_Entry, ...], StorageError | None]:
        """Send and receive this rank's messages; return what was received, and the first failure.

        A failure does not end the exchange, because other ranks still wait for messages.
        """
        received: list[_Entry] = []
        failure: StorageError | None = None
        rank = self._ranks.rank
        for parcel in parcels:
            if rank not in (parcel.sender, parcel.receiver):
                continue
            message = torch.empty(parcel.num_bytes, dtype=torch.uint8)
            try:
                if rank == parcel.sender and failure is None:
                    self._read([place for _, place in parcel.entries], _bytes_of(message))
            except StorageError as error:
                failure = error
            if parcel.num_bytes:
                self._pass_on(parcel, message)
            try:
                if rank == parcel.receiver and failure is None:
                    received += self._unpack(parcel, _bytes_of(message))
            except StorageError as error:
                failure = error
        return tuple(received), failure

    def _pass_on(self, parcel: _Parcel, message: Tensor) -> None:
        if self._ranks.rank == parcel.sender:
            self._ranks.send(message, parcel.receiver)
        else:
            self._ranks.receive(message, parcel.sender)

    def _unpack(self, parcel: _Parcel, data: memoryview) -> Iterator[_Entry]:
        start = 0
        for key, place in parcel.entries:
            stop = start + place.num_bytes
            yield key, self._keep(data[start:stop], place.shape, place.dtype)
            start = stop

    def _open(self, files: Iterable[str]) -> None:
        for file in files:
            self._descriptor(file)

    def _descriptor(self, file: str) -> int:
        """Open the file for reading until the cache is left, so that its owner may leave first."""
        if file not in self._opened:
            try:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise StorageError(
                    f"cannot open {file}, which holds hidden states: {error.strerror}; the processes of a "
                    "run on one machine must belong to one user and see each other under /proc"
                ) from error
            self._open_files.callback(os.close, descriptor)
            self._opened[file] = descriptor
        return self._opened[file]

    def _read(self, places: Sequence[_SpillSlot], buffer: memoryview) -> None:
        start = 0
        for place in places:
            stop = start + place.num_bytes
            with named_failures("read hidden states back from", self._folder):
                _fill(self._descriptor(place.file), buffer[start:stop], place.offset)
            start = stop


class _GrowingFile:
    """An unnamed, append-only file. All processes of the machine can open `path`."""

    def __init__(self, file: BinaryIO) -> None:
        self.path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        self._descriptor = file.fileno()
        self._end = 0

    def append(self, data: memoryview) -> int:
        """Append `data` and return its offset. A failed append leaves the end unchanged."""
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], self._end + done)
        start, self._end = self._end, self._end + done
        return start


def _fill(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:]], offset + done)
        if not count:
            raise StorageError(
                f"hidden states end {len(buffer) - done} bytes early: their file was truncated"
            )
        done += count


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _batches(entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, ...]]:
    batch: list[_Entry] = []
    size = 0
    for entry in entries:
        if batch and size + entry[1].num_bytes > _PARCEL_BYTES:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(entry)
        size += entry[1].num_bytes
    if batch:
        yield tuple(batch)


def _unless(failure: StorageError | None, entries: tuple[_Entry, ...]) -> tuple[_Entry, ...]:
    if failure is not None:
        raise failure
    return entries
