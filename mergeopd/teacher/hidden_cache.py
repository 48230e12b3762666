"""Cache of a round's hidden states, from a teacher's pass until the update that uses them."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import BinaryIO, Protocol, cast

import torch
from torch import Tensor

from mergeopd.storage.failures import named_failures


class RoundCache(Protocol):
    """Interface of a round's caches. Byte counts are this process's, in memory and on disk."""

    num_bytes: int
    num_spilled_bytes: int

    def put(self, teacher: str, rollout: int, hidden: Tensor) -> None:
        """Keep `[trained tokens, d_T]` for one rollout (its index in the round)."""

    def publish(self) -> None:
        """Make what was put since the last call available to `gather`. Collective."""

    def gather(self, teacher: str, rollouts: Sequence[int]) -> Tensor:
        """`[sum of their trained tokens, d_T]` in the order of `rollouts`. A missing one is a KeyError."""


class HiddenCache:
    """Last hidden states of trained response tokens, by teacher and rollout.

    Holds at most `budget_bytes` in main memory; the rest is appended to a file in `folder` and read back
    memory-mapped, bit for bit. A context manager: the file is deleted when the context or the process ends.
    Nothing stays on an accelerator: `put` copies to the CPU, `gather` returns tensors on `device`.
    """

    def __init__(self, budget_bytes: int, folder: Path, device: torch.device) -> None:
        self._budget_bytes = budget_bytes
        self._folder = folder
        self._device = device
        self._held: dict[tuple[str, int], Tensor] = {}
        self._spilled: dict[tuple[str, int], _SpillSlot] = {}
        self._file: BinaryIO | None = None
        self._map: mmap.mmap | None = None
        self.num_bytes = 0
        self.num_spilled_bytes = 0

    def __enter__(self) -> HiddenCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.clear()
        self._spilled.clear()
        # Gathered tensors are copies, so nothing uses the map any more.
        if self._map is not None:
            self._map.close()
        if self._file is not None:
            with suppress(OSError):  # a full disk was reported by the write; the data is no longer needed
                self._file.close()

    def put(self, teacher: str, rollout: int, hidden: Tensor) -> None:
        """Keep `[trained tokens, d_T]` for one rollout (its index in the round).

        Raises KeyError when it is there already, StorageError when the disk fails.
        """
        key = (teacher, rollout)
        if key in self._held or key in self._spilled:
            raise KeyError(f"teacher {teacher!r} has already scored rollout {rollout}")
        hidden = hidden.cpu()
        size = hidden.numel() * hidden.element_size()
        if self.num_bytes + size <= self._budget_bytes:
            self._held[key] = hidden
            self.num_bytes += size
        else:
            self._spilled[key] = self._spill(hidden, size)

    def publish(self) -> None:
        """Do nothing: in one process, tensors are available at once."""

    def gather(self, teacher: str, rollouts: Sequence[int]) -> Tensor:
        return torch.cat([self._get((teacher, rollout)) for rollout in rollouts]).to(self._device)

    def _get(self, key: tuple[str, int]) -> Tensor:
        held = self._held.get(key)
        return self._read(self._spilled[key]) if held is None else held

    def _spill(self, hidden: Tensor, size: int) -> _SpillSlot:
        with named_failures("spill hidden states to", self._folder):
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                # Without a name, the file is deleted with the process, however that ends.
                self._file = cast(BinaryIO, TemporaryFile(dir=self._folder))  # noqa: SIM115 - closed by __exit__
            place = _SpillSlot(self.num_spilled_bytes, hidden.shape, hidden.dtype)
            self._file.write(hidden.contiguous().view(torch.uint8).numpy().tobytes())
        self.num_spilled_bytes += size
        return place

    def _read(self, place: _SpillSlot) -> Tensor:
        assert self._file is not None
        if self._map is None or len(self._map) < self.num_spilled_bytes:
            with named_failures("spill hidden states to", self._folder):
                self._file.flush()
                # Copy-on-write, because torch needs writable memory.
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = place.shape.numel()
        flat = torch.frombuffer(self._map, dtype=place.dtype, count=count, offset=place.offset)
        return flat.view(place.shape)


class _SpillSlot:
    """Offset, shape and dtype of a spilled tensor."""

    __slots__ = ("dtype", "offset", "shape")

    def __init__(self, offset: int, shape: torch.Size, dtype: torch.dtype) -> None:
        self.offset = offset
        self.shape = shape
        self.dtype = dtype
