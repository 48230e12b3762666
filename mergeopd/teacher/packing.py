"""Tensors of a checkpoint packed into buffers, of which every process can read a part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch.distributed as dist
from safetensors.torch import _getdtype
from torch import Tensor

from mergeopd.models.checkpoint import Checkpoint

# The same function: torch 2.13 deprecates the second name, which is the only one in earlier versions.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
stored_dtype = _getdtype
# Alignment of tensors and parts, in bytes: enough for every element type and for fast copies.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes `start` to `start + num_bytes` of a tensor, at `position` in a rank's part."""

    name: str
    start: int
    num_bytes: int
    position: int


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors packed into `num_bytes` bytes, with their offsets. Gaps are never read.

    Rank r of W reads the r-th of W equal parts.
    """

    starts: Mapping[str, int]
    num_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, names: Sequence[str]) -> Batch:
        """Pack tensors in file order, so that parts are mostly contiguous there."""
        total = sum(aligned(checkpoint.tensors[name].num_bytes) for name in names)
        return next(batches(checkpoint, names, total), cls({}, 0))

    def part_bytes(self, size: int) -> int:
        """Return the bytes per rank of `size` ranks; the last ranks' parts may exceed the end."""
        return aligned(-(-self.num_bytes // size))

    def pieces(self, checkpoint: Checkpoint, rank: int, size: int) -> Iterator[Piece]:
        first = rank * self.part_bytes(size)
        end = first + self.part_bytes(size)
        for name, start in self.starts.items():
            stop = start + checkpoint.tensors[name].num_bytes
            low, high = max(first, start), min(end, stop)
            if low < high:
                yield Piece(name, low - start, high - low, low - first)

    def read_part(self, checkpoint: Checkpoint, rank: int, size: int, part: memoryview) -> int:
        """Read a rank's part into `part`; return the bytes read. Raises ModelError."""
        num_bytes = 0
        for piece in self.pieces(checkpoint, rank, size):
            place = part[piece.position : piece.position + piece.num_bytes]
            checkpoint.read_into(piece.name, piece.start, place)
            num_bytes += piece.num_bytes
        return num_bytes

    def tensors(self, checkpoint: Checkpoint, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors as views of `whole`, the bytes of all parts."""
        for name, start in self.starts.items():
            info = checkpoint.tensors[name]
            flat = whole[start : start + info.num_bytes].view(stored_dtype(info.dtype))
            yield name, flat.view(info.shape)


def batches(checkpoint: Checkpoint, names: Sequence[str], batch_bytes: int) -> Iterator[Batch]:
    """Yield batches of at most `batch_bytes`, larger tensors alone, in file order, the same on all ranks."""
    starts: dict[str, int] = {}
    end = 0
    infos = checkpoint.tensors
    for name in sorted(names, key=lambda n: (infos[n].file, infos[n].offset, n)):
        size = aligned(infos[name].num_bytes)
        if starts and end + size > batch_bytes:
            yield Batch(starts, end)
            starts, end = {}, 0
        starts[name] = end
        end += size
    if starts:
        yield Batch(starts, end)


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
