"""How a teacher's weights come from its files: each process for itself, or every process a part for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint

# Tensors are put together by so many bytes at a time, so that small ones do not cost a message each.
_BATCH_BYTES = 256 << 20
# One function: torch 2.13 has the first name and warns of the second, which alone earlier versions know.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Tensors begin, and parts end, at multiples of this: enough for every element type and for fast copies.
_ALIGNMENT = 64

STORED_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}


class Reader(Protocol):
    """A way to read tensors of a checkpoint; all methods want the same `names`, in any order."""

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name, in the file's dtype, on `device` or on the CPU. To be run to its end."""

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        """How many bytes of them this process takes from the files."""

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Ask the system to bring what `read` will want into its cache, and go on."""


class MappedReader:
    """Memory-mapped files: on a CPU nothing is copied, and processes of a machine share the pages."""

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Views of the files, on the CPU; `device` does not matter."""
        yield from checkpoint.read_all(names)

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        """All of them."""
        return sum(checkpoint.tensors[name].num_bytes for name in names)

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """The whole files: what else is in them, the head, is wanted soon after."""
        for file in sorted({checkpoint.tensors[name].file for name in names}):
            _will_need(file, [(0, 0)])


class ShardedReader:
    """Every process reads an equal part of the bytes, and all of them put the tensors together.

    Tensors lie side by side in batches of `batch_bytes`, or alone where they are larger; rank r of W reads
    the r-th W-th of every batch. Batches travel through torch's default process group, on `device`, one at a
    time: beside the tensors there is at most a W-th of a batch, and two batches where they are converted.
    """

    def __init__(self, ranks: Communicator, batch_bytes: int = _BATCH_BYTES) -> None:
        self._ranks = ranks
        self._batch_bytes = batch_bytes

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor on `device`. Collective.

        Raises ModelError on all ranks when their files differ; ModelError on a rank that cannot read its part
        and PeerFailed on the others.
        """
        self._agree(checkpoint)
        for batch in self._batches(checkpoint, names):
            whole = self._whole(checkpoint, batch, device)
            for name, start in batch.starts.items():
                info = checkpoint.tensors[name]
                flat = whole[start : start + info.num_bytes].view(STORED_DTYPES[info.dtype])
                yield name, flat.view(info.shape)

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        """About a W-th of them; over all ranks, all of them."""
        return sum(
            piece.num_bytes
            for batch in self._batches(checkpoint, names)
            for piece in batch.pieces(checkpoint, self._ranks.rank, self._ranks.size)
        )

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """This rank's parts of the files. Not collective."""
        spans: dict[Path, list[tuple[int, int]]] = {}
        for batch in self._batches(checkpoint, names):
            for piece in batch.pieces(checkpoint, self._ranks.rank, self._ranks.size):
                info = checkpoint.tensors[piece.name]
                spans.setdefault(info.file, []).append((info.offset + piece.start, piece.num_bytes))
        for file, own in spans.items():
            _will_need(file, own)

    def _agree(self, checkpoint: Checkpoint) -> None:
        """Parts of different checkpoints would make a model that nobody trained."""
        found = self._ranks.run_and_gather(lambda: checkpoint.fingerprint)
        odd = [str(rank) for rank, fingerprint in enumerate(found) if fingerprint != found[0]]
        if odd:
            raise ModelError(
                f"{checkpoint.folder}: the files on rank {', '.join(odd)} are not those on rank 0; "
                "give every machine the same model folder"
            )

    def _batches(self, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[_Batch]:
        """In file order, so that a part is mostly one stretch of a file; all ranks find the same."""
        starts: dict[str, int] = {}
        end = 0
        infos = checkpoint.tensors
        for name in sorted(names, key=lambda n: (infos[n].file, infos[n].offset, n)):
            size = _aligned(infos[name].num_bytes)
            if starts and end + size > self._batch_bytes:
                yield _Batch(starts, end)
                starts, end = {}, 0
            starts[name] = end
            end += size
        if starts:
            yield _Batch(starts, end)

    def _whole(self, checkpoint: Checkpoint, batch: _Batch, device: torch.device) -> Tensor:
        """The batch's bytes, put together from every rank's part."""
        part = torch.empty(batch.part_bytes(self._ranks.size), dtype=torch.uint8)
        # Before the parts meet, so that nobody waits for one who cannot read.
        self._ranks.run_and_gather(partial(self._read_part, checkpoint, batch, part.numpy().data))
        own = part.to(device)
        if self._ranks.size == 1 or not len(own):
            return own
        whole = torch.empty(len(own) * self._ranks.size, dtype=torch.uint8, device=device)
        _all_gather(whole, own)
        return whole

    def _read_part(self, checkpoint: Checkpoint, batch: _Batch, part: memoryview) -> None:
        for piece in batch.pieces(checkpoint, self._ranks.rank, self._ranks.size):
            place = slice(piece.position, piece.position + piece.num_bytes)
            checkpoint.read_into(piece.name, piece.start, part[place])


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `start` to `start + num_bytes` of a tensor, which stand at `position` in a rank's part."""

    name: str
    start: int
    num_bytes: int
    position: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tensors side by side in `num_bytes` bytes: where each of them starts. Gaps are never read."""

    starts: Mapping[str, int]
    num_bytes: int

    def part_bytes(self, size: int) -> int:
        """What each of `size` ranks contributes; the last ones' parts may lie beyond the end."""
        return _aligned(-(-self.num_bytes // size))

    def pieces(self, checkpoint: Checkpoint, rank: int, size: int) -> Iterator[_Piece]:
        """What a rank's part consists of."""
        first = rank * self.part_bytes(size)
        end = first + self.part_bytes(size)
        for name, start in self.starts.items():
            stop = start + checkpoint.tensors[name].num_bytes
            low, high = max(first, start), min(end, stop)
            if low < high:
                yield _Piece(name, low - start, high - low, low - first)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _will_need(file: Path, spans: Sequence[tuple[int, int]]) -> None:
    """Offsets and lengths; length 0 is up to the end. Nothing on systems that cannot be asked."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset, length in spans:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
