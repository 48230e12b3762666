"""Tensors of a checkpoint as parts: every rank writes its own boxes, any grid reads the boxes that it needs.

A rank's parts are in files `student-RANK-of-W.safetensors`, `student-RANK-of-W-2.safetensors`, ... (ranks
from 1). index.json maps tensors to files and boxes; it and every file have the id of the save.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mergeopd.errors import StorageError
from mergeopd.storage.boxes import Box, deal, flat_boxes

INDEX = "index.json"
# Bytes per file. A power of two: torch rounds pinned buffers up to one.
_MAX_FILE_BYTES = 1 << 30
_NUM_OPEN = 64  # files

# Tensors by name: "shape", "parts" (file, and start and shape of its box).
Entries = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class StatePart:
    """The values of a box of a tensor whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor

    @classmethod
    def full(cls, name: str, tensor: Tensor) -> StatePart:
        shape = tuple(tensor.shape)
        return cls(name, shape, Box.full(shape), tensor)


class SavedTensors(Protocol):
    """A saved state, of which any box can be read."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return the values of a box, or of the whole tensor, on the CPU; not to be changed in place."""


def dealt_parts(tensors: Mapping[str, Tensor], index: int, count: int) -> Iterator[StatePart]:
    """Yield the parts of owner `index` of `count` owners that all have the same contiguous tensors."""
    for name, own in deal({name: t.numel() for name, t in tensors.items()}, index, count):
        tensor = tensors[name]
        shape, position = tuple(tensor.shape), own.start
        flat = tensor.detach().reshape(-1)
        for box in flat_boxes(shape, own.start, own.stop):
            yield StatePart(name, shape, box, flat[position : position + box.numel].view(box.shape))
            position += box.numel


@dataclass(frozen=True)
class StagedFile:
    """Parts of one file in host memory."""

    parts: tuple[StatePart, ...]

    def write(self, path: Path, save: str) -> None:
        tensors = {_key(part.name, part.shape, part.box): part.tensor for part in self.parts}
        save_file(tensors, path, metadata={"save": save})

    def entries(self, file: str) -> Entries:
        entries: Entries = {}
        for part in self.parts:
            entry = entries.setdefault(part.name, {"shape": part.shape, "parts": []})
            entry["parts"].append([file, part.box.start, part.box.shape])
        return entries


def num_bytes(parts: Iterable[StatePart]) -> int:
    return sum(part.tensor.nbytes for part in parts)


def staged(parts: Iterable[StatePart]) -> Iterator[StagedFile]:
    """Copy parts to host memory, one file after another, each into one buffer of at most `_MAX_FILE_BYTES`.

    On CUDA the buffer is pinned and copies are asynchronous; a file is complete when it is yielded.
    """
    for group in _grouped(parts):
        on_cuda = any(part.tensor.is_cuda for part in group)
        buffer = torch.empty(sum(map(_aligned_bytes, group)), dtype=torch.uint8, pin_memory=on_cuda)
        position, copies = 0, []
        for part in group:
            place = buffer[position : position + part.tensor.nbytes]
            copy = place.view(part.tensor.dtype).view(part.box.shape)
            copy.copy_(part.tensor, non_blocking=True)
            copies.append(StatePart(part.name, part.shape, part.box, copy))
            position += _aligned_bytes(part)
        if on_cuda:
            torch.cuda.synchronize()
        yield StagedFile(tuple(copies))


def merge_entries(entries: Entries, more: Entries) -> None:
    """Add the parts of `more` to `entries`."""
    for name, entry in more.items():
        entries.setdefault(name, {"shape": entry["shape"], "parts": []})["parts"] += entry["parts"]


def check_complete(groups: Mapping[str, Entries]) -> None:
    """Raise RuntimeError unless the boxes of every tensor make it up."""
    for entries in groups.values():
        for name, entry in entries.items():
            yielded, numel = sum(prod(shape) for _, _, shape in entry["parts"]), prod(entry["shape"])
            if yielded != numel:
                raise RuntimeError(f"the ranks yield {yielded} of the {numel} elements of {name}")


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    parts: tuple[tuple[str, Box], ...]


class PartsFolder:
    """Tensors that are saved in a folder as parts. Files are mapped when they are needed."""

    def __init__(self, folder: Path, tensors: Mapping[str, _Tensor]) -> None:
        self._folder, self._tensors = folder, tensors
        self._open = lru_cache(_NUM_OPEN)(self._opened)

    @classmethod
    def open_group(cls, folder: Path, index: Mapping[str, Any], group: str) -> PartsFolder:
        """Open a group of tensors of a folder's parsed index. Raises StorageError for another document."""
        try:
            tensors = {
                name: _Tensor(
                    tuple(entry["shape"]),
                    tuple((file, Box(tuple(start), tuple(shape))) for file, start, shape in entry["parts"]),
                )
                for name, entry in index["tensors"].get(group, {}).items()
            }
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StorageError(f"{folder / INDEX} does not list parts of tensors") from error
        return cls(folder, tensors)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self._tensors.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """Return the values of a box, or of the whole tensor; views of mapped files where possible.

        Raises StorageError if a file has other tensors than the index.
        """
        tensor = self._tensors[name]
        wanted, result = box or Box.full(tensor.shape), None
        for file, own in tensor.parts:
            common = wanted.intersect(own)
            if common is None:
                continue
            values = self._slice(file, _key(name, tensor.shape, own), own, common)
            if common == wanted:
                return values
            if result is None:
                result = torch.empty(wanted.shape, dtype=values.dtype)
            result[common.within(wanted)] = values
        assert result is not None
        return result

    def _slice(self, file: str, key: str, own: Box, wanted: Box) -> Tensor:
        try:
            source = self._open(file)
            whole = source.get_slice(key)
            if tuple(whole.get_shape()) != own.shape:
                raise StorageError(
                    f"{file} has {whole.get_shape()} numbers as {key}, and {INDEX} lists {list(own.shape)}"
                )
            values: Tensor = source.get_tensor(key) if wanted == own else whole[wanted.within(own)]
        except SafetensorError as error:
            raise StorageError(f"{file} is not what {INDEX} lists: {error}") from error
        return values

    def _opened(self, file: str) -> Any:
        return safe_open(self._folder / file, framework="pt")


def save_of(path: Path) -> str | None:
    """Return the id of the save that wrote a file of parts; None if it has none or is damaged."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return str(header["__metadata__"]["save"])
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError):
        return None


def _grouped(parts: Iterable[StatePart]) -> Iterator[list[StatePart]]:
    """Yield the parts of each file; large ones are cut into rows."""
    group: list[StatePart] = []
    total = 0
    for part in parts:
        for piece in _cut(part):
            size = _aligned_bytes(piece)
            if group and total + size > _MAX_FILE_BYTES:
                yield group
                group, total = [], 0
            group.append(piece)
            total += size
    if group:
        yield group


def _cut(part: StatePart) -> Iterator[StatePart]:
    """Cut a part into groups of rows that fit in a file, if it has several rows."""
    if part.tensor.nbytes <= _MAX_FILE_BYTES or part.tensor.ndim == 0:
        yield part
        return
    rows = max(1, _MAX_FILE_BYTES * part.tensor.shape[0] // part.tensor.nbytes)
    (first, *rest), (_, *lengths) = part.box.start, part.box.shape
    for position in range(0, part.tensor.shape[0], rows):
        block = part.tensor[position : position + rows]
        box = Box((first + position, *rest), (block.shape[0], *lengths))
        yield StatePart(part.name, part.shape, box, block)


def _aligned_bytes(part: StatePart) -> int:
    return part.tensor.nbytes + -part.tensor.nbytes % 8


def _key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """Return the name of a box in its file: that of the tensor if the box is all of it."""
    return name if box == Box.full(shape) else f"{name}@{','.join(map(str, box.start))}"
