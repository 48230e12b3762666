"""From a block of logits to per-token statistics, and from their gradients back to logit gradients.

All operations are elementwise over `[n, V]` blocks that fit the processor's cache, plus row sums. A sharded
vocabulary needs two or three small all-reduces of per-token scalars.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mergeopd.loss.divergence import Divergence, ForwardKL, Pair, ReverseKL, Terms
from mergeopd.loss.heads import Projection
from mergeopd.loss.softmax import Block, Softmaxes, entropy_and_logprob


@dataclass(frozen=True, eq=False)
class BlockStats:
    """Statistics of n tokens from one pass, in nats, at the loss temperature.

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
    block: Block
    per_mass_S: Tensor  # [n]: p_S = block.masses[0] * per_mass_S
    directions: tuple[tuple[Tensor, ...], ...]  # [K][D] of [n, V]
    factor: Tensor  # [K, D, n]: p_S * g = direction * factor
    total: Tensor  # [K, D, n]: <p_S, g>

    @property
    def student_ranking(self) -> Tensor:
        """`[n, V]`, in each row in the order of the student's logits."""
        return self.block.logits[0]

    def logit_gradient(self, grad_divergence: Tensor, grad_logprob: Tensor, out: Tensor) -> None:
        """Write d(loss)/d(raw student logits) `[n, V]` into `out`, which may be the scored student logits.

        `grad_divergence` `[K, D, n]` and `grad_logprob` `[n]` are the objective's derivatives.
        """
        gain = self.block.student.gain
        pull = (grad_divergence * self.total).sum((0, 1)).add_(grad_logprob).mul_(self.per_mass_S).mul_(-gain)
        torch.mul(self.block.masses[0], pull.unsqueeze(1), out=out)
        push = grad_divergence * self.factor * gain
        for directions, rows in zip(self.directions, push, strict=True):
            for direction, row in zip(directions, rows, strict=True):
                out.addcmul_(direction, row.unsqueeze(1))
        self.block.finish_gradient(grad_logprob, out)


@dataclass(frozen=True, eq=False)
class BlockScorer:
    """Scores blocks of rows for one student, its teachers and any number of divergences."""

    softmaxes: Softmaxes
    divergences: Sequence[Divergence]

    @cached_property
    def _normalise(self) -> bool:
        # One divergence that needs log-probabilities makes them available to all.
        return any(divergence.num_reductions == 3 for divergence in self.divergences)

    def score(
        self, raw: Tensor | Sequence[Tensor], labels_N: Tensor, rows: slice, *, with_grad: bool
    ) -> Scored:
        """Score the tokens `rows` from raw logits, which are overwritten. Performs all reductions.

        raw: `[n, V]` of the student and of the targets that have hidden states, in their order. The result's
        matrices live in the logits' memory and in buffers that the next block reuses.
        """
        block = self.softmaxes.begin(raw, labels_N[rows], with_grad=with_grad)
        logits, masses, sums = block.logits, block.masses, block.sums
        for centred_T in logits[1:]:
            torch.sub(logits[0], centred_T, out=centred_T)
        terms: list[list[Terms]] = []
        if not self._normalise:
            terms = self._terms(masses, logits[1:])
            sums = sums + _flat(terms)
        sums_Rn = self.softmaxes.sum(torch.stack(sums))
        moments = sums_Rn[: 3 * len(logits)].view(len(logits), 3, -1)  # [1+K, 3, n]
        log_mass, entropy, logprob = entropy_and_logprob(moments)
        per_mass = moments[:, 0].reciprocal()
        offset = log_mass[0] - log_mass[1:]  # [K, n]: the excess of the log-ratios of centred logits
        if self._normalise:
            for mass, factor in zip(masses, per_mass, strict=True):
                mass.mul_(factor.unsqueeze(1))
            for log_ratio, row in zip(logits[1:], offset, strict=True):
                log_ratio.sub_(row.unsqueeze(1))
            per_mass = torch.ones_like(per_mass)
            terms = self._terms(masses, logits[1:])
            flat = _flat(terms)
            partial = self.softmaxes.sum(torch.stack(flat)) if flat else sums_Rn[:0]
        else:
            partial = sums_Rn[3 * len(logits) :]
        divergence, factor, total = self._combine(terms, partial, per_mass, offset)
        return Scored(
            BlockStats(divergence, logprob[0], logprob[1:], entropy[0], entropy[1:]),
            block,
            per_mass[0],
            tuple(tuple(term.direction for term in row) for row in terms),
            factor,
            total,
        )

    def _terms(self, masses: Sequence[Tensor], log_ratios: Sequence[Tensor]) -> list[list[Terms]]:
        terms = []
        for teacher, mass_T, log_ratio in zip(self.softmaxes.teachers, masses[1:], log_ratios, strict=True):
            pair = Pair(masses[0], mass_T, log_ratio)
            terms.append([self._term(d, teacher, pair) for d in range(len(self.divergences))])
        return terms

    def _term(self, index: int, teacher: Projection, pair: Pair) -> Terms:
        divergence, num_rows = self.divergences[index], pair.mass_S.shape[0]
        is_last = index == len(self.divergences) - 1
        # The log-ratio is not read after the last divergence, whose direction reuses its memory.
        if is_last or not divergence.own_direction:
            out = pair.log_ratio
        else:
            out = teacher.take(f"direction{index}", num_rows)
        return divergence.terms(pair, out, lambda: self.softmaxes.student.take("scratch", num_rows))

    def _combine(
        self, terms: Sequence[Sequence[Terms]], partial: Tensor, per_mass: Tensor, offset: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reduced sums -> divergence, factor and total, `[K, D, n]` each."""
        shape = (len(terms), len(self.divergences), per_mass.shape[1])
        value, direction_sum = partial.reshape(*shape[:2], 2, shape[2]).unbind(2)
        factor = torch.ones(shape, dtype=per_mass.dtype, device=per_mass.device)
        divergence = value.clone()
        for d, spec in enumerate(self.divergences):
            if not self._normalise and isinstance(spec, ForwardKL | ReverseKL):
                factor[:, d] = per_mass[0] if spec.weighted_by == "student" else per_mass[1:]
                divergence[:, d] = value[:, d] * factor[:, d] - spec.ratio_sign * offset
            for k, row in enumerate(terms):
                factor[k, d] *= row[d].scale
        return divergence, factor, direction_sum * factor


def _flat(terms: Sequence[Sequence[Terms]]) -> list[Tensor]:
    return [part for row in terms for term in row for part in (term.value, term.direction_sum)]
