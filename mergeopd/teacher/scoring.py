"""From the hidden states of a teacher's batches to what is kept of each sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mergeopd.errors import TeacherError
from mergeopd.loss.buffers import Workspace
from mergeopd.loss.heads import Head
from mergeopd.loss.observe import observe
from mergeopd.teacher.protocol import TargetSpec, TeacherSequence
from mergeopd.transfers import to_device

# Responses are reduced in batches of about this many tokens: a matrix product of a few rows is slow.
_ROWS = 256


class FiniteCheck:
    """Finds NaN and infinity in the hidden states of a pass, and waits for the device once, at its end."""

    def __init__(self, teacher: str) -> None:
        self._teacher = teacher
        self._are_finite: Tensor | None = None

    def add(self, states: Tensor) -> None:
        own = torch.isfinite(states).all()
        self._are_finite = own if self._are_finite is None else self._are_finite & own

    def end(self) -> None:
        """Raise TeacherError unless all states were finite."""
        if self._are_finite is not None and not self._are_finite:
            raise TeacherError(
                f"teacher {self._teacher!r} produced NaN or infinite hidden states; "
                "its weights are damaged or its dtype is too narrow (try dtype: float32)"
            )


def rows_of(
    states: Tensor, batch: Sequence[int], sequences: Sequence[TeacherSequence]
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index, [trained tokens, d_T])` of a batch's `states`, which has all of them in order."""
    # Clone: a view would keep the whole batch alive when most of it is spilled or dropped.
    sizes = [sequences[index].num_trained for index in batch]
    for index, rows in zip(batch, torch.split(states, sizes), strict=True):
        yield index, rows.clone()


def reduced(
    teacher: str,
    states: Iterable[tuple[int, Tensor]],
    sequences: Sequence[TeacherSequence],
    read_head: Callable[[], Head],
    spec: TargetSpec,
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index, numbers to keep [trained tokens, w])` for every `(index, hidden states)`, in order.

    The head is read when the first states have come. Raises TeacherError when these are not finite.
    """
    workspace = Workspace()
    head: Head | None = None
    for batch in _batches(states):
        head = read_head() if head is None else head
        hidden = torch.cat([rows for _, rows in batch])
        labels = np.concatenate([sequences[index].trained_ids for index, _ in batch])
        labels_N = to_device(torch.as_tensor(labels, dtype=torch.long), hidden.device)
        try:
            packed = observe(
                hidden, head, labels_N, temperature=spec.temperature, top_k=spec.k, workspace=workspace
            ).packed()
        except ArithmeticError:
            check = FiniteCheck(teacher)
            check.add(hidden)
            check.end()
            raise
        parts = torch.split(packed, [len(rows) for _, rows in batch])
        for (index, _), part in zip(batch, parts, strict=True):
            yield index, part.clone()


def _batches(states: Iterable[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    batch: list[tuple[int, Tensor]] = []
    for index, rows in states:
        batch.append((index, rows))
        if sum(len(rows) for _, rows in batch) >= _ROWS:
            yield batch
            batch = []
    if batch:
        yield batch
