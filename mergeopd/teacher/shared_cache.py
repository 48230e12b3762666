"""Cache of a round's hidden states shared by several processes: one copy on every machine that needs it.

Every process appends the states that it computed to its own files. Other processes of the machine open them
through /proc, so the size of /dev/shm does not matter, and the files are deleted with the processes, however
they end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import StorageError
from mergeopd.teacher.hidden_cache import HiddenCache, Key, SpillSlot, bytes_of

# Maximum bytes per message to another machine; a larger rollout is sent alone.
_PARCEL_BYTES = 64 << 20

_Entry = tuple[Key, SpillSlot]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """One message between two processes: the concatenated bytes of `entries`."""

    sender: int
    receiver: int
    entries: tuple[_Entry, ...]

    @property
    def num_bytes(self) -> int:
        return sum(slot.num_bytes for _, slot in self.entries)


class SharedHiddenCache(HiddenCache):
    """A `HiddenCache` for the processes of a run.

    `loss_ranks(rollout)` returns the ranks that will gather a rollout, the same on every rank. The machine
    holds at most `budget_bytes` in memory, divided equally among its processes. `num_bytes` and
    `num_spilled_bytes` count the bytes that this process holds in memory and on disk, for itself and others.

    Memory and disk are freed when all processes of the machine have left the context. They may leave at any
    time after the last `publish`. Linux only: StorageError elsewhere.
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
        super().__init__(budget_bytes // ranks.num_local, folder, device, ranks.rank)
        self._ranks = ranks
        self._loss_ranks = loss_ranks
        self._fresh: dict[Key, SpillSlot] = {}
        self._scorers: dict[Key, int] = {}

    def _has(self, key: Key) -> bool:
        return key in self._scorers or key in self._fresh

    def _arrive(self, key: Key, hidden: Tensor) -> None:
        self._leaving.discard(key)
        self._fresh[key] = self._keep_tensor(hidden)

    def _arrived(self) -> tuple[_Entry, ...]:
        self._outbox.flush()
        return tuple(self._fresh.items())

    def publish(self) -> None:
        """Make what was put since the last call available to all loss ranks. Collective, after every pass.

        Each rollout is sent once to every other machine that needs it, to the lowest of its loss ranks.
        Raises KeyError on all ranks when two have scored the same rollout; StorageError on the rank whose
        memory or disk fails, and PeerFailed on the others.
        """
        scored = self._ranks.run_and_gather(self._arrived)
        self._fresh = {}
        for rank, entries in enumerate(scored):
            for (teacher, rollout), _ in entries:
                first = self._scorers.setdefault((teacher, rollout), rank)
                if first != rank:
                    raise KeyError(
                        f"teacher {teacher!r} has already scored rollout {rollout} on rank {first}"
                    )
        parcels = self._parcels(scored)
        copies = [scored, self._ranks.run_and_gather(self._exchange(parcels))] if parcels else [scored]
        machines, rank = self._ranks.machines, self._ranks.rank
        mine = {
            key: slot
            for by_rank in copies
            for machine, entries in zip(machines, by_rank, strict=True)
            if machine == machines[rank]
            for key, slot in entries
            if rank in self._loss_ranks(key[1])
        }
        # The collective returns once every file is open, so that its owner may close it.
        self._ranks.run_and_gather(lambda: len([self._descriptor(slot.file) for slot in mine.values()]))
        self._slots.update(mine)

    def _parcels(self, scored: Sequence[Sequence[_Entry]]) -> list[_Parcel]:
        """Return all messages between machines, the same list on every rank.

        Every rank processes its messages in this order, which prevents deadlocks. Messages to the next rank
        come first, then those to the one after it, so that many pairs transfer at the same time.
        """
        wanted: dict[tuple[int, int], list[_Entry]] = {}
        for sender, entries in enumerate(scored):
            for key, slot in entries:
                for receiver in self._relays(key[1], sender):
                    wanted.setdefault((sender, receiver), []).append((key, slot))
        order = sorted(wanted, key=lambda pair: ((pair[1] - pair[0]) % self._ranks.size, pair[0]))
        return [_Parcel(*pair, batch) for pair in order for batch in _batches(wanted[pair])]

    def _relays(self, rollout: int, sender: int) -> Collection[int]:
        """Return the lowest loss rank of this rollout on every other machine."""
        machines = self._ranks.machines
        lowest: dict[str, int] = {}
        for rank in sorted(self._loss_ranks(rollout)):
            lowest.setdefault(machines[rank], rank)
        lowest.pop(machines[sender], None)
        return lowest.values()

    def _exchange(self, parcels: Sequence[_Parcel]) -> Callable[[], tuple[_Entry, ...]]:
        """Send and receive this rank's messages; return a function that returns what was received.

        A failure does not end the exchange, because other ranks still wait for messages. The function raises
        the first one.
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
                    self._read([slot for _, slot in parcel.entries], bytes_of(message))
            except StorageError as error:
                failure = error
            if parcel.num_bytes and rank == parcel.sender:
                self._ranks.send(message, parcel.receiver)
            elif parcel.num_bytes:
                self._ranks.receive(message, parcel.sender)
            try:
                if rank == parcel.receiver and failure is None:
                    received += self._unpack(parcel, bytes_of(message))
            except StorageError as error:
                failure = error

        def result() -> tuple[_Entry, ...]:
            if failure is not None:
                raise failure
            return tuple(received)

        return result

    def _unpack(self, parcel: _Parcel, data: memoryview) -> Iterator[_Entry]:
        start = 0
        for key, slot in parcel.entries:
            stop = start + slot.num_bytes
            yield key, self._keep(data[start:stop], slot.shape, slot.dtype)
            start = stop


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
