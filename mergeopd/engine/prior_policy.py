"""The log-probabilities of student (`pi_old`) and teachers before a round's first update.

They cost one more forward pass of the student, so they are computed only where a phase needs them
(`Plan.needs_prior_policy`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeopd.batch.collate import micro_batch, pack_groups
from mergeopd.batch.micro_batch import MicroBatch, Stream, with_statistics
from mergeopd.batch.objective import support
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.prepare import masked_tokens
from mergeopd.batch.records import OldLogProbs, PreparedRollout, PreparedUpdate
from mergeopd.engine.schedule import RoundSchedule
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.loss.cross_tokenizer import group_logratio
from mergeopd.loss.divergence import ReverseKL
from mergeopd.recipe.training import Phase
from mergeopd.student.loss import Measured
from mergeopd.student.protocol import Trainable
from mergeopd.types import Rollout


@dataclass(frozen=True)
class PriorPolicy:
    """Scores a round under the student's current weights."""

    student: Trainable
    device: torch.device
    stages: Stages

    def score(
        self, rollouts: Sequence[Rollout], phase: Phase, work: RoundSchedule, targets: TeacherTargets
    ) -> dict[int, OldLogProbs]:
        """Return `OldLogProbs` of every response with trained tokens, by index in the round. Collective."""
        loss, placement = phase.loss, self.student.placement
        divergences = (ReverseKL(),) if phase.balance.follow_gap and loss.has_divergence else ()
        what = Measured(divergences, support(loss), loss.temperature)
        packs = work.packs_of(placement.dp_rank)
        # The gap is weighted by the prompts' own weights, without denominators.
        update = PreparedUpdate(
            {
                i: PreparedRollout(r, 1.0, r.prompt.teachers, masked_tokens(r, targets.views))
                for i, r in enumerate(rollouts)
            },
            {},
        )
        like = torch.empty((), dtype=self.student.statistics_dtype, device=self.device)
        on_progress = self.stages.begin("update", "the policy before", len(packs), "micro-batches")

        def micro_batches() -> Iterator[MicroBatch]:
            for done, part in enumerate(packs):
                on_progress(done)
                own = targets.of(part) if placement.has_loss else {}
                same = {name: target for name, target in own.items() if name not in targets.alignments}
                yield micro_batch(part, update, same, targets.views, like, with_policy=False)

        scored = with_statistics(
            Stream(micro_batches(), len(packs)),
            lambda them: self.student.score(them, what),
        )
        old_logprobs: dict[int, OldLogProbs] = {}
        for part, (micro, stats) in zip(packs if placement.has_loss else (), scored, strict=True):
            if not placement.reports_stats:
                continue
            spans = _spans(part, stats.logprob_S.cpu(), rollouts, targets)
            distance = stats.divergence[:, 0] if divergences else (stats.logprob_T - stats.logprob_S).abs()
            sizes = [len(labels) for labels in micro.labels]
            by_response = zip(
                micro.rollouts,
                torch.split(stats.logprob_S.cpu(), sizes),
                torch.split(stats.logprob_T.cpu(), sizes, dim=1),
                torch.split((micro.teacher_weight_KN * distance).sum(0), sizes),
                strict=True,
            )
            for index, logprob_S, logprob_T, gap in by_response:
                # Clone: a view would be sent and kept with the memory of the whole micro-batch.
                by_teacher = {n: row.clone() for n, row in zip(micro.teachers, logprob_T, strict=True)}
                own = {name: ratios[index].clone() for name, ratios in spans.items()}
                old_logprobs[index] = OldLogProbs(logprob_S.clone(), by_teacher, float(gap.sum()), own)
        return {index: old for part in self.stages.ranks.gather(old_logprobs) for index, old in part.items()}


def _spans(
    pack: MicroBatchPlan, logprob_S: Tensor, rollouts: Sequence[Rollout], targets: TeacherTargets
) -> dict[str, dict[int, Tensor]]:
    """Return the log-ratio of each token's group, by teacher with a policy term as bridge and by response."""
    lengths = [rollouts[i].num_trained for i in pack.rollouts]
    ratios = {}
    for name, logprob_T in targets.span_logprobs(pack).items():
        own = [targets.alignments[name][i] for i in pack.rollouts]
        ratio = group_logratio(logprob_S, logprob_T.cpu(), pack_groups(own, lengths, logprob_S.device))
        ratios[name] = dict(zip(pack.rollouts, torch.split(ratio, lengths), strict=True))
    return ratios
