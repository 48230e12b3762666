"""The roles of a student, whatever trains it: each stage takes the one it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mergeopd.batch.micro_batch import MicroBatches
from mergeopd.loss.divergence import Divergence
from mergeopd.loss.objective import DistillationObjective
from mergeopd.loss.support import Support
from mergeopd.rollout import protocol as rollout
from mergeopd.student.loss import MicroStats


@dataclass(frozen=True, slots=True)
class Placement:
    """Which part of the work is this process's.

    The student has `len(replica_ranks)` data-parallel copies and this process belongs to number `dp_rank`;
    `replica_ranks` and `loss_ranks` have, for each copy, the ranks that make it up and those of them that see
    targets and compute losses. `reports_stats` is True on one process of each copy, whose statistics count.
    """

    dp_rank: int
    replica_ranks: tuple[tuple[int, ...], ...]
    loss_ranks: tuple[tuple[int, ...], ...]
    has_loss: bool
    reports_stats: bool

    @property
    def num_replicas(self) -> int:
        """Number of data-parallel copies."""
        return len(self.replica_ranks)


UNSHARDED = Placement(dp_rank=0, replica_ranks=((0,),), loss_ranks=((0,),), has_loss=True, reports_stats=True)


class Trainable(Protocol):
    """What an update asks of a student. On several processes all call it together.

    Everything but the properties is collective.
    """

    @property
    def placement(self) -> Placement:
        """This process's part of the work."""

    @property
    def vocab(self) -> range:
        """True token ids whose rows of the head are here: targets' heads must be cut to them."""

    @property
    def statistics_dtype(self) -> torch.dtype:
        """Precision of losses and per-token weights."""

    def accumulate_gradients(
        self, micro_batches: MicroBatches, objective: DistillationObjective
    ) -> Sequence[MicroStats]:
        """Add the gradient of this copy's micro-batches; their statistics, where losses are computed."""

    def score(
        self,
        micro_batches: MicroBatches,
        divergences: Sequence[Divergence],
        support: Support | None,
        temperature: float,
    ) -> Sequence[MicroStats]:
        """Statistics of this copy's micro-batches under the present weights, where losses are computed."""

    def optimizer_step(self, lr: float) -> float:
        """One optimizer update; the gradient's norm before clipping."""

    def release(self) -> None:
        """Free weights, gradients and optimizer state; nothing can be called afterwards. Not collective."""


class WeightSource(rollout.WeightSource, Protocol):
    """A student's weights, for engines that generate and teachers that follow. Everything is collective."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The forward pass's weights as they are now, whole on every process, by parameter name."""

    def master_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The optimizer's weights as they are now, whole on every process, by parameter name."""


class Stateful(Protocol):
    """What a checkpoint holds of a student."""

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Master weights (`master.NAME`) and optimizer moments, whole, one by one, on rank 0. Collective."""

    def state_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of the master weights in `state`; not collective."""

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `state()`."""


class Exportable(Protocol):
    """A student that can be written down."""

    def export(self, folder: Path) -> None:
        """Write a Hugging Face folder; rank 0 writes. Collective."""


class Student(Trainable, WeightSource, Stateful, Exportable, Protocol):
    """A model under training."""
