"""Softmaxes of a block of rows, shared by all divergences and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.heads import Projection


@dataclass(frozen=True, eq=False)
class Block:
    """n rows of the student, then of each teacher, on this shard's columns.

    logits `[n, V]` are centred: the row's largest is 0. masses are their exponentials. sums holds three `[n]`
    for each model, of this shard alone: mass, mass times centred logit, centred logit of the sampled token.
    """

    student: Projection
    logits: tuple[Tensor, ...]
    masses: tuple[Tensor, ...]
    sums: list[Tensor]
    column_n1: Tensor
    is_local: Tensor  # [n]: the sampled token is one of this shard's columns

    def finish_gradient(self, grad_logprob: Tensor, out: Tensor) -> None:
        """Add the sampled token's part of d(loss)/d(raw logits) and apply the soft cap's slope, in place."""
        if out.shape[1]:
            at_label = torch.where(self.is_local, grad_logprob * self.student.gain, 0.0)
            out.scatter_add_(1, self.column_n1, at_label.unsqueeze(1))
        if self.student.is_capped:
            out.mul_(self.student.take("slope", out.shape[0]))


@dataclass(frozen=True, eq=False)
class Softmaxes:
    """The student and its teachers, whose vocabulary may be sharded over a group."""

    student: Projection
    teachers: Sequence[Projection]
    vocab: range
    group: dist.ProcessGroup | None

    def begin(self, raw: Tensor | Sequence[Tensor], labels_n: Tensor, *, with_grad: bool) -> Block:
        """Centre logits in the memory of the raw ones; compute masses in buffers that the next block reuses.

        Performs one reduction (maxima). The caller reduces the sums, together with its other sums.
        """
        slope = self.student.take("slope", len(labels_n)) if self.student.is_capped and with_grad else None
        logits = tuple(raw)
        self.student.finish_logits(logits[0], slope)
        for projection, matrix in zip(self.teachers, logits[1:], strict=True):
            projection.finish_logits(matrix)
        self._centre(logits)
        is_local = (labels_n >= self.vocab.start) & (labels_n < self.vocab.stop)
        column_n1 = (labels_n - self.vocab.start).clamp_(0, max(len(self.vocab) - 1, 0)).unsqueeze(1)
        masses = tuple(
            torch.exp(centred, out=projection.take("mass", len(labels_n)))
            for projection, centred in zip((self.student, *self.teachers), logits, strict=True)
        )
        sums = []
        for centred, mass in zip(logits, masses, strict=True):
            sums += [mass.sum(1), torch.linalg.vecdot(mass, centred), _pick(centred, column_n1, is_local)]
        return Block(self.student, logits, masses, sums, column_n1, is_local)

    def sum(self, partial: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(partial, dist.ReduceOp.SUM, group=self.group)
        return partial

    def _centre(self, logits: Sequence[Tensor]) -> None:
        top = torch.stack([_row_max(matrix) for matrix in logits])
        if self.group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        for matrix, row in zip(logits, top, strict=True):
            matrix.sub_(row.unsqueeze(1))


def entropy_and_logprob(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced sums `[models, 3, n]` -> log-mass, entropy and log-probability of the sampled token."""
    mass_sum = moments[:, 0]
    log_mass = mass_sum.log()
    return log_mass, log_mass - moments[:, 1] / mass_sum, moments[:, 2] - log_mass


def _row_max(matrix: Tensor) -> Tensor:
    is_empty = matrix.shape[1] == 0  # a shard of padding only
    return matrix.new_full((matrix.shape[0],), -torch.inf) if is_empty else matrix.amax(1)


def _pick(matrix: Tensor, column_n1: Tensor, is_local: Tensor) -> Tensor:
    if matrix.shape[1] == 0:
        return matrix.new_zeros(matrix.shape[0])
    return torch.where(is_local, matrix.gather(1, column_n1).squeeze(1), 0.0)
