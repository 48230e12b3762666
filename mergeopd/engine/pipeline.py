"""Collect rounds: draw prompts, generate and grade responses, and schedule the work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from mergeopd.data.draw import PromptDraw
from mergeopd.data.renderer import Renderer
from mergeopd.engine.progress import Progress, Task, draw_tasks, phase_at
from mergeopd.engine.rollouts import Rewards, StudentRollouts, dataset_rollout
from mergeopd.engine.schedule import RoundSchedule, schedule_round
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import TeacherRolloutCache
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.training import Phase
from mergeopd.rollout.protocol import RolloutEngine
from mergeopd.student.protocol import Placement, WeightSource
from mergeopd.types import Rollout


class RoundPipeline(Protocol):
    """Provides the next round to score and train on."""

    def next(self, progress: Progress) -> CollectedRound:
        """Return the round at `progress`. Collective; raises AbandonRound when a stop was requested."""

    def trained(self, version: int) -> None:
        """Generate with the student's weights after `version` updates from now on. Collective."""

    def close(self) -> None:
        """Release the rollout engine."""


class SynchronousPipeline:
    """Generates every round with the weights of the last update, while nothing else runs."""

    def __init__(
        self,
        plan: Plan,
        *,
        draw: PromptDraw,
        student: Renderer,
        weights: WeightSource,
        engine: RolloutEngine,
        rollouts: StudentRollouts,
        teacher_rollouts: TeacherRolloutCache,
        rewards: Rewards,
        placement: Placement,
        stages: Stages,
    ) -> None:
        self._plan = plan
        self._draw = draw
        self._student = student
        self._weights = weights
        self._engine = engine
        self._rollouts = rollouts
        self._teacher_rollouts = teacher_rollouts
        self._rewards = rewards
        self._placement = placement
        self._stages = stages
        self._prepared_phase = ""

    def next(self, progress: Progress) -> CollectedRound:
        """Draw prompts, get their responses, grade them and schedule the work. Collective."""
        at = phase_at(self._plan, progress.update)
        if at is None:
            raise ValueError(f"the run is complete after {progress.update} updates")
        phase, updates_done = at
        if phase.name != self._prepared_phase:
            self._prepare_teacher_rollouts(phase, updates_done, progress)
        tasks = draw_tasks(self._draw, self._plan.seed, phase, progress, updates_done)
        with self._stages.timed("rollout"):
            rollouts = self._collect(tasks)
            grades = self._rewards.of(rollouts)
        work = self.work(rollouts, progress.round, phase.updates_per_round)
        rewards = [grade.reward for grade in grades]
        failures = {i: v.failure for i, v in enumerate(grades) if v.failure is not None}
        return CollectedRound(phase, updates_done, rollouts, rewards, work, failures)

    def work(self, rollouts: Sequence[Rollout], index: int, num_updates: int) -> RoundSchedule:
        return schedule_round(
            rollouts,
            index,
            num_updates=num_updates,
            max_tokens=self._plan.student.micro_batch_tokens,
            members=self._placement.replica_ranks,
        )

    def trained(self, version: int) -> None:
        self._engine.sync_weights(self._weights, version)

    def close(self) -> None:
        self._engine.close()
        self._rewards.close()

    def _collect(self, tasks: Sequence[Task]) -> list[Rollout]:
        """Return responses to all tasks, the student's first, each kind in the order of the tasks."""
        rollouts = self._rollouts.generate(tasks)
        for task in tasks:
            if task.origin == "teacher":
                rollouts += self._teacher_rollouts.of(task)
            elif task.origin == "dataset":
                rollouts.append(dataset_rollout(task, self._student))
        return rollouts

    def _prepare_teacher_rollouts(self, phase: Phase, updates_done: int, progress: Progress) -> None:
        """Generate all teacher responses that the rest of this phase needs."""
        tasks: list[Task] = []
        while updates_done < phase.updates:
            tasks += draw_tasks(self._draw, self._plan.seed, phase, progress, updates_done)
            progress = replace(progress, drawn=progress.drawn + phase.prompts_per_round)
            updates_done += phase.updates_per_round
        with self._stages.timed("text"):
            self._teacher_rollouts.prepare(tasks)
        self._prepared_phase = phase.name
