"""Collect rounds: draw prompts, generate and grade responses, and schedule the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from mergeopd.data.draw import PhasedDraw
from mergeopd.data.renderer import Renderer
from mergeopd.engine.progress import Progress, Task, draw_tasks, phase_at
from mergeopd.engine.rollouts import Rewards, StudentRollouts, dataset_rollout
from mergeopd.engine.schedule import RoundSchedule, schedule_round
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import KeptText, TeacherRolloutCache, TextFilter
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import RolloutSettings
from mergeopd.recipe.training import Phase
from mergeopd.student.protocol import Student
from mergeopd.types import Rollout


class RoundPipeline(Protocol):
    """Provides the next round to score and train on."""

    def next(self, progress: Progress) -> CollectedRound:
        """Return the round at `progress`. Collective; raises AbandonRound when a stop was requested."""

    def trained(self, version: int) -> None:
        """Generate with the student's weights after `version` updates from now on. Collective."""

    def close(self) -> None:
        """Release the rollout engine."""


@dataclass
class SynchronousPipeline:
    """Generates every round with the weights of the last update, while nothing else runs."""

    plan: Plan
    draw: PhasedDraw
    model: Student
    renderer: Renderer
    rollouts: StudentRollouts
    teacher_rollouts: TeacherRolloutCache
    rewards: Rewards
    stages: Stages
    _prepared_phase: str = field(default="", init=False)
    _kept: KeptText | None = field(default=None, init=False)

    def next(self, progress: Progress) -> CollectedRound:
        at = phase_at(self.plan, progress.update)
        if at is None:
            raise ValueError(f"the run is complete after {progress.update} updates")
        phase, updates_done = at
        if phase.name != self._prepared_phase:
            self._prepare_teacher_rollouts(phase, updates_done, progress)
        tasks = draw_tasks(self.draw, self.plan, phase, progress, updates_done)
        if self._kept is not None:
            tasks = self._kept.tasks(tasks, first=phase.num_drawn(updates_done))
        with self.stages.clock.stage("rollout"):
            settings = self.plan.rollout_of(phase)
            rollouts = self._collect(tasks, settings)
            grades = self.rewards.of(rollouts, settings.stop)
        work = self.work(rollouts, progress.round, phase.updates_per_round)
        rewards = [grade.reward for grade in grades]
        failures = {i: v.failure for i, v in enumerate(grades) if v.failure is not None}
        shares = {} if self._kept is None else self._kept.shares
        return CollectedRound(phase, updates_done, rollouts, rewards, work, failures, shares)

    def work(self, rollouts: Sequence[Rollout], index: int, num_updates: int) -> RoundSchedule:
        return schedule_round(
            rollouts,
            index,
            num_updates=num_updates,
            max_tokens=self.plan.student.micro_batch_tokens,
            members=self.model.placement.replica_ranks,
        )

    def trained(self, version: int) -> None:
        self.rollouts.engine.sync_weights(self.model, version)

    def close(self) -> None:
        self.rollouts.engine.close()
        self.rewards.close()
        self.rollouts.environments.close()

    def _collect(self, tasks: Sequence[Task], settings: RolloutSettings) -> list[Rollout]:
        """Return responses to all tasks, the student's first, each kind in the order of the tasks."""
        rollouts = self.rollouts.generate(tasks, settings)
        for task in tasks:
            if task.origin == "teacher":
                responses = self.teacher_rollouts.of(task, settings)
                rollouts += responses if self._kept is None else self._kept.of(responses)
            elif task.origin == "dataset":
                rollouts.append(dataset_rollout(task, self.renderer))
        return rollouts

    def _prepare_teacher_rollouts(self, phase: Phase, updates_done: int, progress: Progress) -> None:
        """Generate all teacher responses that the rest of this phase needs.

        A phase that keeps some of them needs those of its first rounds, too: what is kept takes the place of
        what is not, in the whole phase.
        """
        if phase.keep != "all":
            progress = replace(progress, drawn=progress.drawn - phase.num_drawn(updates_done))
            updates_done = 0
        tasks: list[Task] = []
        while updates_done < phase.updates:
            tasks += draw_tasks(self.draw, self.plan, phase, progress, updates_done)
            progress = replace(progress, drawn=progress.drawn + phase.prompts_per_round)
            updates_done += phase.updates_per_round
        with self.stages.clock.stage("text"):
            self.teacher_rollouts.prepare(tasks, self.plan.rollout_of(phase))
            self._kept = None
            if phase.keep != "all":
                select = TextFilter(self.plan, self.teacher_rollouts, self.rewards, self.stages).select
                self._kept = select(phase, tasks)
        self._prepared_phase = phase.name
