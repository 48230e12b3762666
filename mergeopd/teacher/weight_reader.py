"""Readers of checkpoint weights: every process reads all of them, or each reads a part for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import _getdtype as stored_dtype
from torch import Tensor

from mergeopd.distributed.communicator import Communicator
from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint

# Bytes gathered per collective, so that small tensors do not cost one message each.
_BATCH_BYTES = 256 << 20
# The same function: torch 2.13 deprecates the second name, which is the only one in earlier versions.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Alignment of tensors and parts, in bytes: enough for every element type and for fast copies.
_ALIGNMENT = 64


class MappedReader:
    """Memory-maps the files: on a CPU nothing is copied, and processes of a machine share the pages.

    All methods take the same `names`, in any order.
    """

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield views of the files, on the CPU; `device` is ignored."""
        yield from checkpoint.read_all(names)

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        """Return the bytes that this process reads from the files."""
        return sum(checkpoint.tensors[name].num_bytes for name in names)

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        """Start reading whole files into the file cache: the rest, the head, is needed soon after."""
        for file in sorted({checkpoint.tensors[name].file for name in names}):
            _will_need(file, [(0, 0)])


class ShardedReader:
    """Reads an equal part of the bytes on every rank, and all-gathers the tensors.

    Tensors are packed into batches of `batch_bytes`, larger ones alone; rank r of W reads the r-th part of W
    of every batch. Batches are gathered over torch's default process group, on `device`, one at a time. Extra
    memory is 1/W of a batch, plus two batches if tensors are converted.
    """

    def __init__(self, ranks: Communicator, batch_bytes: int = _BATCH_BYTES) -> None:
        self._ranks = ranks
        self._batch_bytes = batch_bytes

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor on `device`. Collective.

        Raises ModelError on all ranks when their files differ; ModelError on a rank that cannot read its part
        and PeerFailed on the others.
        """
        self._agree(checkpoint)
        for batch in self._batches(checkpoint, names):
            whole = self._whole(checkpoint, batch, device)
            for name, start in batch.starts.items():
                info = checkpoint.tensors[name]
                flat = whole[start : start + info.num_bytes].view(stored_dtype(info.dtype))
                yield name, flat.view(info.shape)

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        return sum(piece.num_bytes for piece in self._pieces(checkpoint, names))

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        spans: dict[Path, list[tuple[int, int]]] = {}
        for piece in self._pieces(checkpoint, names):
            info = checkpoint.tensors[piece.name]
            spans.setdefault(info.file, []).append((info.offset + piece.start, piece.num_bytes))
        for file, own in spans.items():
            _will_need(file, own)

    def _pieces(self, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[_Piece]:
        for batch in self._batches(checkpoint, names):
            yield from batch.pieces(checkpoint, self._ranks.rank, self._ranks.size)

    def _agree(self, checkpoint: Checkpoint) -> None:
        """Raise ModelError on all ranks unless all have the same checkpoint."""
        fingerprints = self._ranks.run_and_gather(lambda: checkpoint.fingerprint)
        odd = [str(rank) for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
        if odd:
            raise ModelError(
                f"{checkpoint.folder}: the files on rank {', '.join(odd)} are not those on rank 0; "
                "give every machine the same model folder"
            )

    def _batches(self, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[_Batch]:
        """Yield batches in file order, the same on all ranks, so that parts are mostly contiguous."""
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
        part = torch.empty(batch.part_bytes(self._ranks.size), dtype=torch.uint8)

        def read() -> None:
            for piece in batch.pieces(checkpoint, self._ranks.rank, self._ranks.size):
                place = slice(piece.position, piece.position + piece.num_bytes)
                checkpoint.read_into(piece.name, piece.start, part.numpy().data[place])

        # Before the collective, so that no rank waits for one that cannot read.
        self._ranks.run_and_gather(read)
        own = part.to(device)
        if self._ranks.size == 1 or not len(own):
            return own
        whole = torch.empty(len(own) * self._ranks.size, dtype=torch.uint8, device=device)
        _all_gather(whole, own)
        return whole


Reader = MappedReader | ShardedReader


@dataclass(frozen=True, slots=True)
class _Piece:
    """Bytes `start` to `start + num_bytes` of a tensor, at `position` in a rank's part."""

    name: str
    start: int
    num_bytes: int
    position: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tensors packed into `num_bytes` bytes, with their offsets. Gaps are never read."""

    starts: Mapping[str, int]
    num_bytes: int

    def part_bytes(self, size: int) -> int:
        """Return the bytes per rank of `size` ranks; the last ranks' parts may exceed the end."""
        return _aligned(-(-self.num_bytes // size))

    def pieces(self, checkpoint: Checkpoint, rank: int, size: int) -> Iterator[_Piece]:
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
    """Read ahead spans of (offset, length); length 0 is to the end. No effect without posix_fadvise."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset, length in spans:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
