"""What the engine asks of a student, whatever trains it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from mergeopd.loss.divergence import Divergence
from mergeopd.loss.heads import Head
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.support import Support
from mergeopd.student.batch import MicroBatches
from mergeopd.student.losses import MicroStats


@dataclass(frozen=True, slots=True)
class Place:
    """Which part of the work is this process's.

    The student has `len(members)` data-parallel copies and this process belongs to number `copy`; `members`
    and `readers` have, for each copy, the ranks that make it up and those of them that see targets and
    compute losses. `tells` is True on one process of each copy: its statistics are the copy's.
    """

    copy: int
    members: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]
    has_loss: bool
    tells: bool

    @property
    def copies(self) -> int:
        """Number of data-parallel copies."""
        return len(self.members)


WHOLE = Place(copy=0, members=((0,),), readers=((0,),), has_loss=True, tells=True)


class Student(Protocol):
    """A model under training. On several processes each has one and all call it alike.

    `vocab` are the true token ids whose rows of the head are here: targets' heads must be cut alike.
    Everything but the properties is collective.
    """

    @property
    def place(self) -> Place:
        """This process's part."""

    @property
    def vocab(self) -> range:
        """Token ids that this process scores."""

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Precision of losses and per-token weights."""

    def accumulate(self, micros: MicroBatches, objective: DistillationObjective) -> Iterable[MicroStats]:
        """Add the gradient of this copy's micro-batches; where there are losses, their statistics."""

    def score(
        self,
        micros: MicroBatches,
        divergences: Sequence[Divergence],
        support: Support | None,
        temperature: float,
    ) -> Iterable[MicroStats]:
        """Statistics of this copy's micro-batches under the weights as they are, where there are losses."""

    def apply(self, lr: float) -> float:
        """One optimizer update; the gradient's norm before clipping."""

    def whole(self) -> AbstractContextManager[tuple[nn.Module, Head]]:
        """Body and head as they are now, whole on every process, to write with."""

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The forward pass's weights as they are now, whole on every process, by parameter name."""

    def named_masters(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's weights as they are now, whole on every process, by parameter name."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights (`master.NAME`) and optimizer moments, whole, one by one, on rank 0 alone."""

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the master weights in `state`; not collective."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from `state()`."""

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; rank 0 writes."""

    def release(self) -> None:
        """Free weights, gradients and optimizer state; nothing can be called afterwards. Not collective."""
