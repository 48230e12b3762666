"""The log-probabilities of student (`pi_old`) and teachers before a round's first update.

They cost one more forward pass of the student, so they are computed only where a phase needs them
(`Plan.needs_prior_policy`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergeopd.batch.collate import micro_batch, pack_groups
from mergeopd.batch.micro_batch import MicroBatch, Stream, with_statistics
from mergeopd.batch.objective import support
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.prepare import masked_tokens
from mergeopd.batch.records import OldLogProbs, PreparedRollout, PreparedUpdate, PriorScores
from mergeopd.engine.schedule import RoundSchedule
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.loss.cross_tokenizer import group_logratio
from mergeopd.loss.divergence import ReverseKL
from mergeopd.loss.targets import Target
from mergeopd.recipe.training import Phase
from mergeopd.student.loss import Measured, MicroStats
from mergeopd.student.protocol import Trainable
from mergeopd.teacher.protocol import SupportIds
from mergeopd.teacher.token_view import TokenView
from mergeopd.transfers import to_host
from mergeopd.types import Rollout


@dataclass(frozen=True)
class PriorPolicy:
    """Scores a round under the student's current weights."""

    student: Trainable
    device: torch.device
    stages: Stages

    def score(
        self, rollouts: Sequence[Rollout], phase: Phase, work: RoundSchedule, targets: TeacherTargets
    ) -> PriorScores:
        """Return the scores of this copy's responses, on ranks that compute losses. Collective.

        The gaps of all responses are known to all ranks, if the phase follows them.
        """
        loss, placement = phase.loss, self.student.placement
        divergences = (ReverseKL(),) if phase.balance.follow_gap and loss.has_divergence else ()
        what = Measured(divergences, support(loss), loss.temperature)
        packs = work.packs_of(placement.dp_rank)
        on_progress = self.stages.begin("update", "the policy before", len(packs), "micro-batches")

        def same_tokens(part: MicroBatchPlan) -> dict[str, Target]:
            own = targets.of(part) if placement.has_loss else {}
            return {name: target for name, target in own.items() if name not in targets.alignments}

        scored = self._scored(rollouts, packs, targets.views, what, same_tokens, on_progress)
        sizes = [[len(labels) for labels in micro.labels] for micro, _ in scored]
        logprobs: list[Tensor] = []
        gaps_on_device: list[Tensor] = []
        for (micro, stats), own_sizes in zip(scored, sizes, strict=True):
            distance = stats.divergence[:, 0] if divergences else (stats.logprob_T - stats.logprob_S).abs()
            gaps_N = (micro.teacher_weight_KN * distance).sum(0)
            gaps_on_device += [own.sum() for own in torch.split(gaps_N, own_sizes)]
            logprobs += (stats.logprob_S, stats.logprob_T)
        read, gap_of = iter(to_host(logprobs)), iter(torch.stack(gaps_on_device).tolist() if scored else ())
        old_logprobs: dict[int, OldLogProbs] = {}
        own_packs = packs if placement.has_loss else ()
        for part, (micro, _), own_sizes in zip(own_packs, scored, sizes, strict=True):
            logprobs_S, logprobs_T = next(read), next(read)
            spans = _spans(part, logprobs_S, rollouts, targets)
            by_response = zip(
                micro.rollouts,
                torch.split(logprobs_S, own_sizes),
                torch.split(logprobs_T, own_sizes, dim=1),
                strict=True,
            )
            for index, logprob_S, logprob_T in by_response:
                by_teacher = dict(zip(micro.teachers, logprob_T, strict=True))
                own = {name: ratios[index] for name, ratios in spans.items()}
                old_logprobs[index] = OldLogProbs(logprob_S, by_teacher, next(gap_of), own)
        gaps: dict[int, float] = {}
        if phase.balance.follow_gap:
            own_gaps = {i: old.gap for i, old in old_logprobs.items()} if placement.reports_stats else {}
            for of_rank in self.stages.ranks.gather(own_gaps):
                gaps |= of_rank
        return PriorScores(old_logprobs, gaps)

    def top_ids(
        self, rollouts: Sequence[Rollout], phase: Phase, work: RoundSchedule, targets: TeacherTargets, k: int
    ) -> dict[int, SupportIds]:
        """Return the student's k most probable ids at each trained token, `[tokens, k]`, by rollout.

        Those of this copy's rollouts, on the ranks that compute its losses; empty on others. Collective.
        """
        packs = work.packs_of(self.student.placement.dp_rank)
        on_progress = self.stages.begin("teachers", "the student's top k", len(packs), "micro-batches")
        what = Measured((), None, phase.loss.temperature, top_ids=k)
        supports: dict[int, SupportIds] = {}
        for micro, stats in self._scored(rollouts, packs, targets.views, what, lambda _: {}, on_progress):
            assert stats.top_ids is not None
            parts = torch.split(stats.top_ids, [len(labels) for labels in micro.labels])
            supports |= {i: ids.numpy() for i, ids in zip(micro.rollouts, parts, strict=True)}
        return supports

    def _scored(
        self,
        rollouts: Sequence[Rollout],
        packs: Sequence[MicroBatchPlan],
        views: Mapping[str, TokenView],
        what: Measured,
        targets_of: Callable[[MicroBatchPlan], Mapping[str, Target]],
        on_progress: Callable[[int], None],
    ) -> list[tuple[MicroBatch, MicroStats]]:
        # The gap is weighted by the prompts' own weights, without denominators.
        update = PreparedUpdate(
            {
                i: PreparedRollout(r, 1.0, r.prompt.teachers, masked_tokens(r, views))
                for pack in packs
                for i in pack.rollouts
                for r in (rollouts[i],)
            },
            {},
        )
        like = torch.empty((), dtype=self.student.statistics_dtype, device=self.device)

        def micro_batches() -> Iterator[MicroBatch]:
            for done, part in enumerate(packs):
                on_progress(done)
                yield micro_batch(part, update, targets_of(part), views, like, with_policy=False)

        return with_statistics(
            Stream(micro_batches(), len(packs)), lambda them: self.student.score(them, what)
        )


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
