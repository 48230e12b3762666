"""Cache of a round's hidden states, from a teacher's pass until the update that uses them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Self, cast

import torch
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.storage.failures import named_failures
from mergeopd.transfers import Outbox, host_buffer, to_device

Key = tuple[str, int]  # teacher, rollout

# Maximum bytes on their way from an accelerator; about as many are pinned.
_UNDER_WAY_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SpillSlot:
    """Location of hidden states in `file`, which every process of its machine can open."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HiddenCache:
    """Last hidden states of trained response tokens, by teacher and rollout.

    Holds at most `budget_bytes` in main memory; the rest is appended to a file in `folder`, bit for bit. The
    file has no name and is deleted when the context or the process ends.
    Nothing stays on an accelerator: `put` begins a copy to main memory, and `publish` and `gather` wait for
    all of them; `gather` returns tensors on `device`, for whose copies the host does not wait.
    `num_bytes` and `num_spilled_bytes` count what this process holds in memory and on disk.
    """

    def __init__(self, budget_bytes: int, folder: Path, device: torch.device, rank: int = 0) -> None:
        self._rank = rank
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._device = device
        self._memory: _GrowingFile | None = None
        self._disk: _GrowingFile | None = None
        self._held: dict[Key, Tensor] = {}
        self._slots: dict[Key, SpillSlot] = {}
        self._opened: dict[str, int] = {}
        self._open_files = ExitStack()
        self._outbox = Outbox(_UNDER_WAY_BYTES)
        self._leaving: set[Key] = set()
        self.num_bytes = 0
        self.num_spilled_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._outbox.clear()
        self._leaving.clear()
        self._held.clear()
        self._slots.clear()
        self._opened.clear()
        with suppress(OSError):  # a full disk was reported by the write; the data is no longer needed
            self._open_files.close()

    def put(self, teacher: str, rollout: int, hidden: Tensor) -> None:
        """Keep `[trained tokens, d_T]` for one rollout (its index in the round).

        Raises KeyError when it is there already. Raises StorageError, or `publish` does, when memory or the
        disk fails.
        """
        key = (teacher, rollout)
        if self._has(key) or key in self._leaving:
            raise KeyError(f"teacher {teacher!r} has already scored rollout {rollout}")
        self._leaving.add(key)
        self._outbox.send(hidden, lambda copy: self._arrive(key, copy))

    def _has(self, key: Key) -> bool:
        return key in self._held or key in self._slots

    def _arrive(self, key: Key, hidden: Tensor) -> None:
        """Keep states that are in main memory."""
        self._leaving.discard(key)
        if self.num_bytes + hidden.nbytes <= self._budget_bytes:
            self._held[key] = hidden.clone() if hidden.is_pinned() else hidden
            self.num_bytes += hidden.nbytes
        else:
            self._slots[key] = self._keep_tensor(hidden)

    def publish(self) -> None:
        """Make what was put since the last call available to `gather`. Collective; at once in one process."""
        self._outbox.flush()

    def gather(self, teacher: str, rollouts: Sequence[int]) -> Tensor:
        """`[sum of their trained tokens, d_T]` in the order of `rollouts`, on this cache's device.

        Raises KeyError for a rollout that was not published for this process.
        """
        self._outbox.flush()
        keys = [(teacher, rollout) for rollout in rollouts]
        missing = [key[1] for key in keys if key not in self._held and key not in self._slots]
        if missing:
            raise KeyError(
                f"no hidden states of teacher {teacher!r} for rollout {missing[0]} were published for "
                f"rank {self._rank}"
            )
        if not any(key in self._held for key in keys):
            return to_device(self._load(teacher, [self._slots[key] for key in keys]), self._device)
        parts = [
            self._held[key] if key in self._held else self._load(teacher, [self._slots[key]]) for key in keys
        ]
        shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
        gathered = host_buffer(shape, parts[0].dtype, self._device)
        return to_device(torch.cat(parts, out=gathered), self._device)

    def _load(self, teacher: str, slots: Sequence[SpillSlot]) -> Tensor:
        """Read hidden states from their files, one behind the other."""
        kinds = {(slot.shape[1:], slot.dtype) for slot in slots}
        if len(kinds) != 1:
            raise ValueError(f"hidden states of teacher {teacher!r} are of {len(kinds)} kinds: {kinds}")
        ((width, dtype),) = kinds
        gathered = host_buffer((sum(slot.shape[0] for slot in slots), *width), dtype, self._device)
        self._read(slots, bytes_of(gathered))
        return gathered

    def _keep_tensor(self, hidden: Tensor) -> SpillSlot:
        return self._keep(bytes_of(hidden.contiguous()), tuple(hidden.shape), hidden.dtype)

    def _keep(self, data: memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> SpillSlot:
        """Append to the memory file within the budget, else to the one on disk."""
        if self.num_bytes + len(data) <= self._budget_bytes:
            file, offset = self._keep_in_memory(data)
            self.num_bytes += len(data)
        else:
            with named_failures("spill hidden states to", self._folder):
                if self._disk is None:
                    self._folder.mkdir(parents=True, exist_ok=True)
                    nameless = TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - closed by __exit__
                    self._disk = self._growing(nameless)
                file, offset = self._disk.path, self._disk.append(data)
            self.num_spilled_bytes += len(data)
        return SpillSlot(file, offset, shape, dtype)

    def _keep_in_memory(self, data: memoryview) -> tuple[str, int]:
        try:
            if self._memory is None:
                nameless = os.fdopen(os.memfd_create("hidden states"), "r+b", buffering=0)
                self._memory = self._growing(nameless)
            return self._memory.path, self._memory.append(data)
        except OSError as error:
            raise StorageError(
                f"cannot keep {len(data)} more bytes of hidden states in memory besides {self.num_bytes}: "
                f"{error.strerror}; lower `memory: {{hidden_states_gib: ...}}`, "
                "then run the same command again"
            ) from error

    def _growing(self, nameless: object) -> _GrowingFile:
        file = _GrowingFile(self._open_files.enter_context(cast(BinaryIO, nameless)))
        self._opened[file.path] = file.descriptor
        return file

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

    def _read(self, slots: Sequence[SpillSlot], buffer: memoryview) -> None:
        start = 0
        with named_failures("read hidden states back from", self._folder):
            for slot in slots:
                stop = start + slot.num_bytes
                _fill(self._descriptor(slot.file), buffer[start:stop], slot.offset)
                start = stop


class _GrowingFile:
    """An unnamed, append-only file. On Linux, all processes of the machine can open `path`."""

    def __init__(self, file: BinaryIO) -> None:
        self.descriptor = file.fileno()
        self.path = f"/proc/{os.getpid()}/fd/{self.descriptor}"
        self._end = 0

    def append(self, data: memoryview) -> int:
        """Append `data` and return its offset. A failed append leaves the end unchanged."""
        done = 0
        while done < len(data):
            done += os.pwrite(self.descriptor, data[done:], self._end + done)
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


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
