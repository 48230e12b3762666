"""Readers of checkpoint weights: every process reads all of them, or each reads a part for all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergeopd.distributed.communicator import Communicator, SingleProcess
from mergeopd.errors import ModelError
from mergeopd.models.checkpoint import Checkpoint
from mergeopd.teacher.packing import Batch, Piece, all_gather, batches

# Bytes gathered per collective, so that small tensors do not cost one message each.
_BATCH_BYTES = 256 << 20


class MappedReader:
    """Memory-maps the files: on a CPU nothing is copied, and processes of a machine share the pages.

    All methods take the same `names`, in any order. `ranks` are the processes that read together.
    """

    ranks: Communicator = SingleProcess()

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
            will_need(file, [(0, 0)])


class ShardedReader:
    """Reads an equal part of the bytes on every rank, and all-gathers the tensors.

    Tensors are packed into batches of `batch_bytes`, larger ones alone; rank r of W reads the r-th part of W
    of every batch. Batches are gathered over torch's default process group, on `device`, one at a time. Extra
    memory is 1/W of a batch, plus two batches if tensors are converted.
    """

    def __init__(self, ranks: Communicator, batch_bytes: int = _BATCH_BYTES) -> None:
        self.ranks = ranks
        self._batch_bytes = batch_bytes

    def read(
        self, checkpoint: Checkpoint, names: Sequence[str], device: torch.device
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor on `device`. Collective.

        Raises ModelError on all ranks when their files differ; ModelError on a rank that cannot read its part
        and PeerFailed on the others.
        """
        self._agree(checkpoint)
        for batch in batches(checkpoint, names, self._batch_bytes):
            yield from batch.tensors(checkpoint, self._whole(checkpoint, batch, device))

    def num_bytes(self, checkpoint: Checkpoint, names: Sequence[str]) -> int:
        return sum(piece.num_bytes for piece in self._pieces(checkpoint, names))

    def read_ahead(self, checkpoint: Checkpoint, names: Sequence[str]) -> None:
        spans: dict[Path, list[tuple[int, int]]] = {}
        for piece in self._pieces(checkpoint, names):
            info = checkpoint.tensors[piece.name]
            spans.setdefault(info.file, []).append((info.offset + piece.start, piece.num_bytes))
        for file, own in spans.items():
            will_need(file, own)

    def _pieces(self, checkpoint: Checkpoint, names: Sequence[str]) -> Iterator[Piece]:
        for batch in batches(checkpoint, names, self._batch_bytes):
            yield from batch.pieces(checkpoint, self.ranks.rank, self.ranks.size)

    def _agree(self, checkpoint: Checkpoint) -> None:
        """Raise ModelError on all ranks unless all have the same checkpoint."""
        fingerprints = self.ranks.run_and_gather(lambda: checkpoint.fingerprint)
        odd = [str(rank) for rank, fingerprint in enumerate(fingerprints) if fingerprint != fingerprints[0]]
        if odd:
            raise ModelError(
                f"{checkpoint.folder}: the files on rank {', '.join(odd)} are not those on rank 0; "
                "give every machine the same model folder"
            )

    def _whole(self, checkpoint: Checkpoint, batch: Batch, device: torch.device) -> Tensor:
        part = torch.empty(batch.part_bytes(self.ranks.size), dtype=torch.uint8)
        rank, size = self.ranks.rank, self.ranks.size
        # Before the collective, so that no rank waits for one that cannot read.
        self.ranks.run_and_gather(lambda: batch.read_part(checkpoint, rank, size, part.numpy().data))
        own = part.to(device)
        if self.ranks.size == 1 or not len(own):
            return own
        whole = torch.empty(len(own) * self.ranks.size, dtype=torch.uint8, device=device)
        all_gather(whole, own)
        return whole


Reader = MappedReader | ShardedReader


def will_need(file: Path, spans: Sequence[tuple[int, int]]) -> None:
    """Read ahead spans of (offset, length); length 0 is to the end. No effect without posix_fadvise."""
    if not hasattr(os, "posix_fadvise"):
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset, length in spans:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
