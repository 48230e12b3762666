"""The weights of a streamed body, by the times at which they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mergeopd.models.checkpoint import Checkpoint
from mergeopd.models.residency import by_layer
from mergeopd.teacher.packing import Batch, stored_dtype

# Makes parameters of a folder's tensors.
Assemble = Callable[[Iterable[tuple[str, Tensor]]], Iterable[tuple[str, Tensor]]]


@dataclass(frozen=True)
class StreamedWeights:
    """The tensors of a body: those of each layer, the embedding's, and the rest, such as the final norm.

    `tensors` are all of their names, `embedding` is one of them. `assemble` yields parameters by their full
    names, which begin with `prefix`, in the precision and on the device of computation. `is_copied`: none is
    a view of what it gets. `count` gets the bytes that were read.
    """

    checkpoint: Checkpoint
    tensors: Sequence[str]
    embedding: str
    prefix: str
    assemble: Assemble
    is_copied: bool
    count: Callable[[int], None]

    @cached_property
    def _groups(self) -> dict[int | None, list[str]]:
        return by_layer(self.tensors)

    @cached_property
    def layers(self) -> list[list[str]]:
        """The names of the tensors of each layer."""
        numbers = sorted(number for number in self._groups if number is not None)
        return [self._groups[number] for number in numbers]

    def of_layer(self, index: int, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Return a layer's parameters, by their names in it."""
        prefix = f"{self.prefix}.layers.{index}."
        return {name.removeprefix(prefix): values for name, values in self.assemble(tensors)}

    def around(self) -> dict[str, Tensor]:
        """Read the parameters besides layers and embedding, by their names in the body."""
        names = [name for name in self._groups.get(None, ()) if name != self.embedding]
        batch = Batch.of(self.checkpoint, names)
        whole = torch.empty(batch.part_bytes(1), dtype=torch.uint8)
        self.count(batch.read_part(self.checkpoint, 0, 1, whole.numpy().data))
        read = self.assemble(batch.tensors(self.checkpoint, whole))
        return {name.removeprefix(f"{self.prefix}."): values for name, values in read}

    def rows(self, ids: NDArray[np.int64]) -> Tensor:
        """Read the embeddings `[len(ids), d]` of sorted token ids."""
        info = self.checkpoint.tensors[self.embedding]
        row_bytes = info.num_bytes // info.shape[0]
        buffer = torch.empty(len(ids) * row_bytes, dtype=torch.uint8)
        starts = np.flatnonzero(np.diff(ids, prepend=-2) != 1)
        spans = zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True)
        view = buffer.numpy().data
        self.checkpoint.read_parts(
            self.embedding,
            ((int(ids[low]) * row_bytes, view[low * row_bytes : high * row_bytes]) for low, high in spans),
        )
        self.count(len(buffer))
        stored = buffer.view(stored_dtype(info.dtype)).view(len(ids), *info.shape[1:])
        [(_, values)] = self.assemble([(self.embedding, stored)])
        return values
