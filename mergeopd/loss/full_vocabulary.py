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

from mergeopd.loss.divergence import Divergence, ForwardKL, Pair, Terms
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
    """A block between its statistics and its gradient: masses, directions and their sums.

    `sums [R, n]` are over all shards: what `BlockScorer.stats` needs of these tokens.
    """

    scorer: BlockScorer
    block: Block
    terms: tuple[tuple[Terms, ...], ...]  # [K][D]
    sums: Tensor

    @property
    def stats(self) -> BlockStats:
        return self.scorer.stats(self.sums)

    @property
    def student_ranking(self) -> Tensor:
        """`[n, V]`, in each row in the order of the student's logits."""
        return self.block.logits[0]

    def logit_gradient(self, grad_divergence: Tensor, grad_logprob: Tensor | None, out: Tensor) -> None:
        """Write d(loss)/d(raw student logits) `[n, V]` into `out`, which may be the scored student logits.

        `grad_divergence` `[K, D, n]` and `grad_logprob` `[n]` (None: zero) are the objective's derivatives.
        `dz = gain * slope * (sum_kd push * direction - p_S * pull + the sampled token's part)`.
        """
        scorer, gain, moments = self.scorer, self.block.student.gain, self.sums
        direction_sums = moments[scorer.num_moments :].view(*grad_divergence.shape[:2], 2, out.shape[0])[
            :, :, 1
        ]
        pull, pushes = torch.zeros_like(moments[0]) if grad_logprob is None else grad_logprob * gain, []
        for k, row in enumerate(self.terms):
            for d, term in enumerate(row):
                push = grad_divergence[k, d] * (term.scale * gain)
                if not scorer.normalises:
                    push = push / moments[3 * scorer.weighting_model(k, d)]
                pull = torch.addcmul(pull, push, direction_sums[k, d])
                pushes.append((term.direction, push.unsqueeze(1)))
        pull = pull.neg_() if scorer.normalises else pull.div_(moments[0]).neg_()
        torch.mul(self.block.masses[0], pull.unsqueeze(1), out=out)
        for direction, push in pushes:
            out.addcmul_(direction, push)
        self.block.finish_gradient(grad_logprob, out)


@dataclass(frozen=True, eq=False)
class BlockScorer:
    """Scores blocks of rows for one student, its teachers and any number of divergences."""

    softmaxes: Softmaxes
    divergences: Sequence[Divergence]

    @cached_property
    def normalises(self) -> bool:
        """Whether a divergence needs log-probabilities, which are then available to all."""
        return any(divergence.num_reductions == 3 for divergence in self.divergences)

    @property
    def num_moments(self) -> int:
        """Rows of the sums that are the models' own; the others are those of divergences."""
        return 3 * (1 + len(self.softmaxes.teachers))

    @property
    def num_sums(self) -> int:
        return self.num_moments + 2 * len(self.softmaxes.teachers) * len(self.divergences)

    def weighting_model(self, k: int, d: int) -> int:
        """Return the model (0: the student) under whose mass a KL's sums are taken."""
        spec = self.divergences[d]
        return k + 1 if isinstance(spec, ForwardKL) else 0

    def score(self, raw: Tensor | Sequence[Tensor], rows: slice, *, with_grad: bool) -> Scored:
        """Score the tokens `rows` from raw logits, which are overwritten. Performs all reductions.

        raw: `[n, V]` of the student and of the targets that have hidden states, in their order. The result's
        matrices live in the logits' memory and in buffers that the next block reuses.
        """
        keep = any(divergence.uses_mass_T for divergence in self.divergences)
        block = self.softmaxes.begin(raw, rows, with_grad=with_grad, keep_teachers=keep)
        logits, masses, sums = block.logits, block.masses, block.sums
        for centred_T in logits[1:]:
            torch.sub(logits[0], centred_T, out=centred_T)
        terms: list[tuple[Terms, ...]] = []
        if not self.normalises:
            terms = self._terms(masses, logits[1:])
            return Scored(self, block, tuple(terms), self.softmaxes.sum(torch.stack(sums + _flat(terms))))
        sums_Rn = self.softmaxes.sum(torch.stack(sums))
        mass_sums = sums_Rn[::3]
        for mass, total in zip(masses, mass_sums[: len(masses)], strict=True):
            mass.div_(total.unsqueeze(1))
        log_mass = mass_sums.log()
        for log_ratio, row in zip(logits[1:], log_mass[:1] - log_mass[1:], strict=True):
            log_ratio.sub_(row.unsqueeze(1))
        terms = self._terms(masses, logits[1:])
        if flat := _flat(terms):
            sums_Rn = torch.cat([sums_Rn, self.softmaxes.sum(torch.stack(flat))])
        return Scored(self, block, tuple(terms), sums_Rn)

    def stats(self, sums_Rn: Tensor) -> BlockStats:
        """Compute the statistics of tokens from their sums."""
        num_models, num = 1 + len(self.softmaxes.teachers), sums_Rn.shape[1]
        moments = sums_Rn[: self.num_moments].view(num_models, 3, num)
        log_mass, entropy, logprob = entropy_and_logprob(moments)
        value = sums_Rn[self.num_moments :].view(num_models - 1, len(self.divergences), 2, num)[:, :, 0]
        divergence = value.clone()
        if not self.normalises:
            # The log-ratios of centred logits exceed the true ones by a constant.
            excess = log_mass[:1] - log_mass[1:]
            for d, spec in enumerate(self.divergences):
                is_forward = isinstance(spec, ForwardKL)
                mass = moments[1:, 0] if is_forward else moments[:1, 0]
                divergence[:, d] = value[:, d] / mass + (excess if is_forward else -excess)
        return BlockStats(divergence, logprob[0], logprob[1:], entropy[0], entropy[1:])

    def _terms(self, masses: Sequence[Tensor], log_ratios: Sequence[Tensor]) -> list[tuple[Terms, ...]]:
        terms = []
        for k, (teacher, log_ratio) in enumerate(zip(self.softmaxes.teachers, log_ratios, strict=True)):
            # Masses that are not kept are not read.
            pair = Pair(masses[0], masses[k + 1] if len(masses) > 1 else masses[0], log_ratio)
            terms.append(tuple(self._term(d, teacher, pair) for d in range(len(self.divergences))))
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


def _flat(terms: Sequence[Sequence[Terms]]) -> list[Tensor]:
    return [part for row in terms for term in row for part in (term.value, term.direction_sum)]
