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

# Responses are reduced in batches of about this many tokens: a matrix product of a few rows is slow.
_ROWS = 256


def rows_of(
    teacher: str, states: Tensor, batch: Sequence[int], sequences: Sequence[TeacherSequence]
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index, [trained tokens, d_T])` of a batch's `states`, which has all of them in order.

    Raises TeacherError when one is not finite.
    """
    if not torch.isfinite(states).all():
        raise TeacherError(
            f"teacher {teacher!r} produced NaN or infinite hidden states; "
            "its weights are damaged or its dtype is too narrow (try dtype: float32)"
        )
    # Clone: a view would keep the whole batch alive when most of it is spilled or dropped.
    sizes = [sequences[index].num_trained for index in batch]
    for index, rows in zip(batch, torch.split(states, sizes), strict=True):
        yield index, rows.clone()


def reduced(
    states: Iterable[tuple[int, Tensor]],
    sequences: Sequence[TeacherSequence],
    read_head: Callable[[], Head],
    spec: TargetSpec,
) -> Iterator[tuple[int, Tensor]]:
    """Yield `(index, numbers to keep [trained tokens, w])` for every `(index, hidden states)`, in order.

    The head is read when the first states have come.
    """
    workspace = Workspace()
    head: Head | None = None
    for batch in _batches(states):
        head = read_head() if head is None else head
        hidden = torch.cat([rows for _, rows in batch])
        labels = np.concatenate([sequences[index].trained_ids for index, _ in batch])
        labels_N = torch.tensor(labels, dtype=torch.long, device=hidden.device)
        packed = observe(
            hidden, head, labels_N, temperature=spec.temperature, top_k=spec.k, workspace=workspace
        ).packed()
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
