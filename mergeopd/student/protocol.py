"""The roles of a student, independent of the backend: each stage takes the role that it needs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatches
from mergeopd.errors import StorageError
from mergeopd.loss.objective import DistillationObjective
from mergeopd.rollout import protocol as rollout
from mergeopd.storage.state_parts import SavedTensors, StatePart
from mergeopd.student.loss import Measured, MicroStats, Observe


@dataclass(frozen=True, slots=True)
class Placement:
    """This process's part of the work.

    The student has `len(replica_ranks)` data-parallel copies, and this process belongs to copy `dp_rank`. For
    each copy, `replica_ranks` are its ranks, and `loss_ranks` those that get targets and compute losses.
    `reports_stats` is True on the one process of each copy whose statistics are used.
    """

    dp_rank: int
    replica_ranks: tuple[tuple[int, ...], ...]
    loss_ranks: tuple[tuple[int, ...], ...]
    has_loss: bool
    reports_stats: bool


UNSHARDED = Placement(dp_rank=0, replica_ranks=((0,),), loss_ranks=((0,),), has_loss=True, reports_stats=True)


class Trainable(Protocol):
    """The methods that an update needs. All but the properties are collective."""

    @property
    def placement(self) -> Placement:
        """This process's part of the work."""

    @property
    def vocab(self) -> range:
        """True token ids whose rows of the head are on this rank; targets' heads must have the same rows."""

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Precision of losses and per-token weights."""

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: DistillationObjective, observe: Observe | None = None
    ) -> Sequence[MicroStats]:
        """Add the gradient of this copy's micro-batches; return statistics on ranks that compute losses.

        Micro-batches are consumed one at a time; `observe` is that of `Measured`. Raises NumericsError on all
        ranks when the student's or a teacher's distribution is not finite.
        """

    def score(self, micro_batches: MicroBatches, what: Measured) -> Sequence[MicroStats]:
        """Return statistics under the current weights as `accumulate_gradients` does; no gradient."""

    def optimizer_step(self, lr: float) -> float:
        """Perform one optimizer update; return the gradient's norm before clipping.

        Raises NumericsError on all ranks, without changing weights, when the norm is not finite.
        """

    def release(self) -> None:
        """Free weights, gradients and optimizer state; nothing can be called afterwards. Not collective."""


class WeightSource(rollout.WeightSource, Protocol):
    """A student's weights, for rollout engines and snapshots. All methods are collective.

    Beside `folder_weights`, each needs memory for the whole student on every process.
    """

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the forward pass's current weights by parameter name, unsharded on every process."""

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the optimizer's current weights by parameter name, unsharded on every process."""


class Stateful(Protocol):
    """A student's part of a checkpoint; NAME is that of a published folder's tensor (`models/experts.py`)."""

    def state(self) -> Iterator[StatePart]:
        """Yield this rank's boxes of master weights (`master.NAME`) and moments (`adamw.KEY.NAME`).

        The boxes of all ranks are disjoint and make up the tensors; ranks with the same values divide them,
        so that all yield nearly the same number of bytes. Not copies; not collective.
        """

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the master weights in `state`; not collective."""

    def load_state(self, tensors: SavedTensors) -> None:
        """Restore the `state()` of any backend and grid; a rank reads the boxes that it needs. Collective."""


def check_masters(own: Mapping[str, object], saved: Collection[str]) -> None:
    """Raise StorageError unless a checkpoint's master weights have the names of `own`."""
    odd = own.keys() ^ {key for key in saved if key.startswith("master.")}
    if odd:
        listed = ", ".join(sorted(odd)[:3])
        raise StorageError(f"the checkpoint is not of this student: {listed} on one side only")


class Exportable(Protocol):
    """A student that can be exported."""

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; rank 0 writes. Collective."""


class Student(Trainable, WeightSource, Stateful, Exportable, Protocol):
    """A model under training."""
