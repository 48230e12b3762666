"""States of students as whole tensors in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from mergeopd.storage.boxes import Box
from mergeopd.storage.state_parts import StatePart


class HeldTensors:
    """Whole tensors in the place of a checkpoint's folder."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, box: Box | None = None) -> Tensor:
        tensor = self._tensors[name]
        whole = Box.full(tuple(tensor.shape))
        return tensor[(box or whole).within(whole)]


def joined(parts: Iterable[StatePart]) -> dict[str, Tensor]:
    """Join the parts of all ranks; every element must be there exactly once. Copies."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    for part in parts:
        tensor = tensors.setdefault(part.name, torch.full(part.shape, torch.nan, dtype=part.tensor.dtype))
        count = counts.setdefault(part.name, torch.zeros(part.shape, dtype=torch.int32))
        where = part.box.within(Box.full(part.shape))
        tensor[where] = part.tensor
        count[where] += 1
    assert all(bool((count == 1).all()) for count in counts.values())
    return tensors
