"""From a block of logits to per-token statistics, and from their gradients back to logit gradients.

Everything here is elementwise over `[n, V]` blocks that fit the processor's cache, plus row sums. A sharded
vocabulary meets in two or three small all-reduces of per-token scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mergeopd.loss.divergence import Divergence, ForwardKL, Pair, ReverseKL, Terms
from mergeopd.loss.heads import Projection


@dataclass(frozen=True, eq=False)
class BlockStats:
    """What one pass knows about each of n tokens, in nats, at the loss temperature.

    divergence `[K, D, n]` of teacher k by divergence d; logprob_S `[n]` and logprob_T `[K, n]` of the sampled
    token; entropy_S `[n]`; entropy_T `[K, n]`. An objective may differentiate `divergence` and `logprob_S`.
    """

    divergence: Tensor
    logprob_S: Tensor
    logprob_T: Tensor
    entropy_S: Tensor
    entropy_T: Tensor


@dataclass(frozen=True, eq=False)
class Scored:
    """A block between its statistics and its gradient: masses, directions and their per-row factors."""

    stats: BlockStats
    mass_S: Tensor
    per_mass_S: Tensor  # [n]: p_S = mass_S * per_mass_S
    directions: tuple[tuple[Tensor, ...], ...]  # [K][D] of [n, V]
    factor: Tensor  # [K, D, n]: p_S * g = direction * factor
    total: Tensor  # [K, D, n]: <p_S, g>
    column_n1: Tensor
    is_local: Tensor  # [n]: the sampled token is one of this shard's columns


class BlockScorer:
    """Scores blocks of rows for one student, its teachers and the divergences asked for."""

    def __init__(
        self,
        student: Projection,
        teachers: Sequence[Projection],
        divergences: Sequence[Divergence],
        vocab: range,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._student = student
        self._teachers = tuple(teachers)
        self._divergences = tuple(divergences)
        self._vocab = vocab
        self._group = group
        # One divergence that needs log-probabilities makes them available to all.
        self._normalise = any(divergence.num_reductions == 3 for divergence in divergences)

    def score(self, raw_S: Tensor, raw_T: Sequence[Tensor], labels_n: Tensor, *, with_grad: bool) -> Scored:
        """Statistics of n rows from raw logits `[n, V]`, which are overwritten. Takes all reductions.

        The returned matrices live in the logits' memory and in buffers that the next block reuses.
        """
        slope = self._student.take("slope", len(labels_n)) if self._student.is_capped and with_grad else None
        self._student.finish_logits(raw_S, slope)
        for projection, raw in zip(self._teachers, raw_T, strict=True):
            projection.finish_logits(raw)
        logits = (raw_S, *raw_T)
        self._centre(logits)
        is_local = (labels_n >= self._vocab.start) & (labels_n < self._vocab.stop)
        column_n1 = (labels_n - self._vocab.start).clamp_(0, max(len(self._vocab) - 1, 0)).unsqueeze(1)
        projections = (self._student, *self._teachers)
        masses = [
            torch.exp(centred, out=projection.take("mass", len(labels_n)))
            for projection, centred in zip(projections, logits, strict=True)
        ]
        sums = []
        for centred, mass in zip(logits, masses, strict=True):
            sums += [mass.sum(1), torch.linalg.vecdot(mass, centred), _pick(centred, column_n1, is_local)]
        for centred_T in logits[1:]:
            torch.sub(raw_S, centred_T, out=centred_T)
        terms: list[list[Terms]] = []
        if not self._normalise:
            terms = self._terms(masses, logits[1:])
            sums += _flat(terms)
        sums_Rn = self._sum(torch.stack(sums))
        moments = sums_Rn[: 3 * len(logits)].view(len(logits), 3, -1)  # [1+K, 3, n]
        mass_sum, log_mass = moments[:, 0], moments[:, 0].log()
        per_mass = mass_sum.reciprocal()
        offset = log_mass[0] - log_mass[1:]  # [K, n]: what the log-ratios of centred logits have too much
        if self._normalise:
            for mass, factor in zip(masses, per_mass, strict=True):
                mass.mul_(factor.unsqueeze(1))
            for log_ratio, row in zip(logits[1:], offset, strict=True):
                log_ratio.sub_(row.unsqueeze(1))
            per_mass = torch.ones_like(per_mass)
            terms = self._terms(masses, logits[1:])
            flat = _flat(terms)
            partial = self._sum(torch.stack(flat)) if flat else sums_Rn[:0]
        else:
            partial = sums_Rn[3 * len(logits) :]
        divergence, factor, total = self._combine(terms, partial, per_mass, offset)
        entropy = log_mass - moments[:, 1] / mass_sum
        logprob = moments[:, 2] - log_mass
        return Scored(
            BlockStats(divergence, logprob[0], logprob[1:], entropy[0], entropy[1:]),
            masses[0],
            per_mass[0],
            tuple(tuple(term.direction for term in row) for row in terms),
            factor,
            total,
            column_n1,
            is_local,
        )

    def logit_gradient(
        self, scored: Scored, grad_divergence: Tensor, grad_logprob: Tensor, out: Tensor
    ) -> None:
        """Write d(loss)/d(raw student logits) `[n, V]` into `out`, which may be the scored student logits.

        `grad_divergence` `[K, D, n]` and `grad_logprob` `[n]` are the objective's derivatives.
        """
        gain = self._student.gain
        pull = (
            (grad_divergence * scored.total)
            .sum((0, 1))
            .add_(grad_logprob)
            .mul_(scored.per_mass_S)
            .mul_(-gain)
        )
        torch.mul(scored.mass_S, pull.unsqueeze(1), out=out)
        push = grad_divergence * scored.factor * gain
        for directions, rows in zip(scored.directions, push, strict=True):
            for direction, row in zip(directions, rows, strict=True):
                out.addcmul_(direction, row.unsqueeze(1))
        if out.shape[1]:
            at_label = torch.where(scored.is_local, grad_logprob * gain, 0.0)
            out.scatter_add_(1, scored.column_n1, at_label.unsqueeze(1))
        if self._student.is_capped:
            out.mul_(self._student.take("slope", out.shape[0]))

    def _centre(self, logits: Sequence[Tensor]) -> None:
        top = torch.stack([_row_max(matrix) for matrix in logits])
        if self._group is not None:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self._group)
        for matrix, row in zip(logits, top, strict=True):
            matrix.sub_(row.unsqueeze(1))

    def _sum(self, partial: Tensor) -> Tensor:
        if self._group is not None:
            dist.all_reduce(partial, dist.ReduceOp.SUM, group=self._group)
        return partial

    def _terms(self, masses: Sequence[Tensor], log_ratios: Sequence[Tensor]) -> list[list[Terms]]:
        terms = []
        for teacher, mass_T, log_ratio in zip(self._teachers, masses[1:], log_ratios, strict=True):
            pair = Pair(masses[0], mass_T, log_ratio)
            terms.append([self._term(d, teacher, pair) for d in range(len(self._divergences))])
        return terms

    def _term(self, index: int, teacher: Projection, pair: Pair) -> Terms:
        divergence, num_rows = self._divergences[index], pair.mass_S.shape[0]
        is_last = index == len(self._divergences) - 1
        # Nobody reads the log-ratio after the last divergence: its memory serves as that one's direction.
        if is_last or not divergence.own_direction:
            out = pair.log_ratio
        else:
            out = teacher.take(f"direction{index}", num_rows)
        return divergence.terms(pair, out, lambda: self._student.take("scratch", num_rows))

    def _combine(
        self, terms: Sequence[Sequence[Terms]], partial: Tensor, per_mass: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced sums -> divergence, factor and total, `[K, D, n]` each."""
        shape = (len(self._teachers), len(self._divergences), per_mass.shape[1])
        value, direction_sum = partial.reshape(*shape[:2], 2, shape[2]).unbind(2)
        factor = torch.ones(shape, dtype=per_mass.dtype, device=per_mass.device)
        divergence = value.clone()
        for d, spec in enumerate(self._divergences):
            if not self._normalise and isinstance(spec, ForwardKL | ReverseKL):
                factor[:, d] = per_mass[0] if spec.weighted_by == "student" else per_mass[1:]
                divergence[:, d] = value[:, d] * factor[:, d] - spec.ratio_sign * offset
            for k, row in enumerate(terms):
                factor[k, d] *= row[d].scale
        return divergence, factor, direction_sum * factor


def _flat(terms: Sequence[Sequence[Terms]]) -> list[Tensor]:
    return [part for row in terms for term in row for part in (term.value, term.direction_sum)]


def _row_max(matrix: Tensor) -> Tensor:
    if matrix.shape[1] == 0:  # a shard of nothing but padding
        return matrix.new_full((matrix.shape[0],), -torch.inf)
    return matrix.amax(1)


def _pick(matrix: Tensor, column_n1: Tensor, is_local: Tensor) -> Tensor:
    if matrix.shape[1] == 0:
        return matrix.new_zeros(matrix.shape[0])
    return torch.where(is_local, matrix.gather(1, column_n1).squeeze(1), 0.0)
