"""Softmaxes of a block of rows, shared by all divergences and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.divergence import row_dots
from mergeopd.loss.heads import Projection


@dataclass(frozen=True, eq=False)
class Block:
    """n rows of the student, then of each teacher, on this shard's columns.

    logits `[n, V]` are centred: the row's largest is 0. masses are their exponentials, of the teachers only
    if they are kept. sums holds three `[n]` for each model, of this shard alone: mass, mass times centred
    logit, centred logit of the sampled token.
    """

    student: Projection
    logits: tuple[Tensor, ...]
    masses: tuple[Tensor, ...]
    sums: list[Tensor]
    column_n1: Tensor
    is_local: Tensor | None  # [n]: the sampled token is one of this shard's columns; None: all are

    def finish_gradient(self, grad_logprob: Tensor | None, out: Tensor) -> None:
        """Add the sampled token's part of d(loss)/d(raw logits) and apply the soft cap's slope, in place."""
        if grad_logprob is not None and out.shape[1]:
            at_label = grad_logprob * self.student.gain
            if self.is_local is not None:
                at_label = torch.where(self.is_local, at_label, 0.0)
            out.scatter_add_(1, self.column_n1, at_label.unsqueeze(1))
        if self.student.is_capped:
            out.mul_(self.student.take("slope", out.shape[0]))


@dataclass(frozen=True, eq=False)
class Softmaxes:
    """The student and its teachers at N tokens; their vocabulary may be sharded over a group."""

    student: Projection
    teachers: Sequence[Projection]
    vocab: range
    group: dist.ProcessGroup | None
    labels_N: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """The sampled tokens' columns `[N, 1]`; those of other shards, or of none, are clamped."""
        columns = self.labels_N - self.vocab.start
        return columns.clamp_(0, max(len(self.vocab) - 1, 0)).unsqueeze(1)

    @cached_property
    def are_local(self) -> Tensor | None:
        """Whether the sampled tokens are this shard's, `[N]`; None without a group."""
        if self.group is None and len(self.vocab):
            return None
        return (self.labels_N >= self.vocab.start) & (self.labels_N < self.vocab.stop)

    def begin(
        self, raw: Tensor | Sequence[Tensor], rows: slice, *, with_grad: bool, keep_teachers: bool = True
    ) -> Block:
        """Centre logits in the memory of the raw ones; compute masses in buffers that the next block reuses.

        Performs one reduction (maxima). The caller reduces the sums, together with its other sums. The
        student comes last: without the teachers' masses, its matrices are what remains in a cache.
        """
        models, logits = (self.student, *self.teachers), tuple(raw)
        num, last = rows.stop - rows.start, len(models) - 1
        column_n1 = self.columns[rows]
        is_local = None if self.are_local is None else self.are_local[rows]
        slope = self.student.take("slope", num) if self.student.is_capped and with_grad else None
        tops: Tensor | None = None
        if self.group is not None:
            for index, (model, matrix) in enumerate(zip(models, logits, strict=True)):
                model.finish_logits(matrix, None if index else slope)
            tops = torch.stack([_row_max(matrix) for matrix in logits])
            dist.all_reduce(tops, dist.ReduceOp.MAX, group=self.group)
        masses: list[Tensor] = []
        sums: list[Tensor] = []
        for index in (*range(1, last + 1), 0):
            model, matrix = models[index], logits[index]
            if tops is None:
                model.finish_logits(matrix, None if index else slope)
            matrix.sub_((_row_max(matrix) if tops is None else tops[index]).unsqueeze(1))
            owner = model if keep_teachers else self.student
            mass = torch.exp(matrix, out=owner.take("mass", num))
            masses.append(mass)
            sums += [mass.sum(1), row_dots(mass, matrix), _pick(matrix, column_n1, is_local)]
        masses = [masses[-1], *masses[:-1]] if keep_teachers else masses[-1:]
        return Block(self.student, logits, tuple(masses), [*sums[-3:], *sums[:-3]], column_n1, is_local)

    def sum(self, partial: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(partial, dist.ReduceOp.SUM, group=self.group)
        return partial


def entropy_and_logprob(moments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced sums `[models, 3, n]` -> log-mass, entropy and log-probability of the sampled token."""
    mass_sum = moments[:, 0]
    log_mass = mass_sum.log()
    return log_mass, log_mass - moments[:, 1] / mass_sum, moments[:, 2] - log_mass


def _row_max(matrix: Tensor) -> Tensor:
    is_empty = matrix.shape[1] == 0  # a shard of padding only
    return matrix.new_full((matrix.shape[0],), -torch.inf) if is_empty else matrix.amax(1)


def _pick(matrix: Tensor, column_n1: Tensor, is_local: Tensor | None) -> Tensor:
    if matrix.shape[1] == 0:
        return matrix.new_zeros(matrix.shape[0])
    picked = matrix.gather(1, column_n1).squeeze(1)
    return picked if is_local is None else torch.where(is_local, picked, 0.0)
