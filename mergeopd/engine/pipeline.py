"""Collect rounds: draw prompts, generate and grade responses, and schedule the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mergeopd.engine.progress import Progress, Task, phase_at
from mergeopd.engine.rollouts import Rewards, StudentRollouts
from mergeopd.engine.schedule import RoundSchedule, schedule_round
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import FixedText
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import RolloutSettings
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
    model: Student
    rollouts: StudentRollouts
    text: FixedText
    rewards: Rewards
    stages: Stages

    def next(self, progress: Progress) -> CollectedRound:
        at = phase_at(self.plan, progress.update)
        if at is None:
            raise ValueError(f"the run is complete after {progress.update} updates")
        phase, updates_done = at
        tasks = self.text.tasks(phase, updates_done, progress)
        with self.stages.clock.stage("rollout"):
            settings = self.plan.rollout_of(phase)
            rollouts = self._collect(tasks, settings)
            grades = self.rewards.of(rollouts, settings.stop)
        work = self.work(rollouts, progress.round, phase.updates_per_round)
        rewards = [grade.reward for grade in grades]
        failures = {i: v.failure for i, v in enumerate(grades) if v.failure is not None}
        return CollectedRound(phase, updates_done, rollouts, rewards, work, failures, self.text.kept_shares)

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
        return [*self.rollouts.generate(tasks, settings), *self.text.of(tasks, settings)]
