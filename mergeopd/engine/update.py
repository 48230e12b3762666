"""Optimizer updates: the gradient of prepared micro-batches, the step, and its events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from mergeopd.batch.collate import micro_batch
from mergeopd.batch.micro_batch import MicroBatch, Stream, with_statistics
from mergeopd.batch.objective import phase_objective
from mergeopd.batch.packing import MicroBatchPlan
from mergeopd.batch.prepare import prepare
from mergeopd.batch.records import PreparedUpdate
from mergeopd.engine.progress import Progress
from mergeopd.engine.samples import SampleTaker, choose, is_due
from mergeopd.engine.schedule import UpdatePlan, clip_factor, learning_rate
from mergeopd.engine.score import ScoredRound
from mergeopd.engine.stages import Stages
from mergeopd.engine.targets import TeacherTargets
from mergeopd.engine.update_stats import UpdateStats
from mergeopd.loss.objective import DistillationObjective
from mergeopd.models.flops import TrainingFlops
from mergeopd.models.tokenizer import Tokenizer
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.routing import writer_of
from mergeopd.reporting.events import UpdateDone
from mergeopd.student.protocol import Student
from mergeopd.types import Rollout


@dataclass(frozen=True)
class Updater:
    """Makes the updates of scored rounds.

    `bytes_read` returns the checkpoint bytes of teachers read so far, over all processes, `peak_memory` the
    most bytes that any of them has used.
    """

    plan: Plan
    student: Student
    tokenizer: Tokenizer
    vocab_size: int
    device: torch.device
    bytes_read: Callable[[], int]
    peak_memory: Callable[[], int]
    flops: TrainingFlops
    stages: Stages

    def step(self, scored: ScoredRound, update: UpdatePlan, progress: Progress) -> Progress:
        """Make the round's next update and report it. Collective.

        Raises AbandonRound when a stop was requested and the round has not changed any weight yet.
        """
        collected = scored.collected
        phase, rollouts, position = collected.phase, collected.rollouts, collected.work.updates.index(update)
        updates_done = collected.updates_done + position
        number = progress.update + 1
        stages = self.stages if position == 0 else replace(self.stages, guard=None)
        objective = phase_objective(phase, updates_done, has_policy=self.plan.has_policy(phase))
        lr = phase.lr_scale * learning_rate(progress.update, self.plan.optimizer, self.plan.num_updates)
        with stages.clock.stage("update"):
            prepared = self.prepare(scored, update, updates_done)
            due = is_due(number, self.plan.num_updates)
            samples = SampleTaker(choose(rollouts, update.rollouts) if due else (), objective)
            packs = update.packs[self.student.placement.dp_rank]
            stats = self.accumulate_gradients(objective, prepared, packs, scored.targets, samples, stages)
            stats.refuse_uniform_teachers(self.vocab_size)
            grad_norm = self.student.optimizer_step(lr)
        members = {i: rollouts[i] for i in update.rollouts}
        own = list(members.values())
        num_on_policy = sum(rollout.origin == "student" for rollout in own)
        stages.reporter.emit(
            UpdateDone(
                update=number,
                phase=phase.name,
                round=collected.work.index,
                lr=lr,
                loss=stats.loss,
                grad_norm=grad_norm,
                num_tokens=sum(rollout.num_trained for rollout in own),
                on_policy_fraction=num_on_policy / len(own),
                teachers=stats.teachers(scored.targets.views),
                domains=stats.domains(members, prepared.budgets, collected.rewards),
                seconds=stages.clock.lap(),
                teacher_bytes_read=self.bytes_read(),
                policy=stats.policy(scored.outcomes.zero_advantage_fraction),
                clip_factor=clip_factor(grad_norm, self.plan.optimizer.clip_grad),
                verifier_failures=collected.num_failures(update.rollouts),
                text_kept=collected.text_kept,
                selected=collected.selected,
                peak_memory_bytes=self.peak_memory(),
                num_generated=_num_generated(own),
                flops=self._flops(own, scored),
                serving=collected.serving if position == 0 else None,
            )
        )
        if stages.ranks.is_first:  # the only one that writes them
            for sample in samples.events(number, phase.name, rollouts, collected.rewards, self.tokenizer):
                stages.reporter.emit(sample)
        return replace(progress, update=number)

    def _flops(self, rollouts: Sequence[Rollout], scored: ScoredRound) -> dict[str, float]:
        """Return the operations that responses cost, by stage; cached texts of teachers count, too."""
        flops: Counter[str] = Counter()
        prior_policy = self.plan.needs_prior_policy(scored.collected.phase)
        for rollout in rollouts:
            teachers = rollout.teacher_set if scored.targets.spec is not None else ()
            flops += self.flops.of_training(
                rollout.num_tokens, rollout.num_trained, teachers, prior_policy=prior_policy
            )
            if rollout.origin != "dataset":
                by = writer_of(rollout.prompt) if rollout.origin == "teacher" else None
                flops += self.flops.of_generation(len(rollout.prompt_ids), len(rollout.response_ids), by)
        return {stage: float(count) for stage, count in flops.items()}

    def prepare(self, scored: ScoredRound, update: UpdatePlan, updates_done: int) -> PreparedUpdate:
        """Compute the weights of this copy's rollouts, after `updates_done` updates of the phase.

        The denominators are those of the whole update.
        """
        collected = scored.collected
        return prepare(
            collected.rollouts,
            update.rollouts,
            collected.work.trained_by(self.student.placement.dp_rank, update.rollouts),
            collected.phase,
            updates_done,
            scored.targets.views,
            scored.outcomes,
            scored.old,
            scored.targets.alignments,
        )

    def accumulate_gradients(
        self,
        objective: DistillationObjective,
        prepared: PreparedUpdate,
        packs: Sequence[MicroBatchPlan],
        targets: TeacherTargets,
        samples: SampleTaker,
        stages: Stages,
    ) -> UpdateStats:
        """Accumulate the gradient of an update over `packs`, the micro-batches of this copy. Collective.

        One teacher set's heads are in memory at a time.
        """
        stats = UpdateStats(objective)
        on_progress = stages.begin("update", "", len(packs), "micro-batches")
        like = torch.empty((), dtype=self.student.statistics_dtype, device=self.device)
        has_loss, with_policy = self.student.placement.has_loss, objective.policy is not None

        def micro_batches() -> Iterator[MicroBatch]:
            for done, pack in enumerate(packs):
                on_progress(done)
                own = targets.of(pack) if has_loss else {}
                micro = micro_batch(
                    pack,
                    prepared,
                    own,
                    targets.views,
                    like,
                    with_policy=with_policy,
                    terms=objective.names,
                )
                if has_loss:
                    samples.look_at_teachers(micro)
                yield micro

        measured = with_statistics(
            Stream(micro_batches(), len(packs)),
            lambda them: self.student.accumulate_gradients(them, objective, samples.look_at_student),
        )
        for micro, tokens in measured:
            if self.student.placement.reports_stats:
                stats.add(micro, prepared, tokens)
                samples.take(micro, prepared, tokens)
        stats.together(self.stages.ranks)
        samples.together(self.stages.ranks)
        return stats


def _num_generated(rollouts: Sequence[Rollout]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for rollout in rollouts:
        counts[rollout.origin] += len(rollout.response_ids)
    return dict(counts)
