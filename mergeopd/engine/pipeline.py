"""Collect rounds: draw prompts, generate and grade responses, and schedule the work."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from mergeopd.engine.interrupt import Interrupt
from mergeopd.engine.parity import ParityGuard
from mergeopd.engine.progress import Progress, Task, draw_tasks, phase_at
from mergeopd.engine.rollouts import Rewards, StudentRollouts
from mergeopd.engine.schedule import RoundSchedule, schedule_round
from mergeopd.engine.score import CollectedRound
from mergeopd.engine.selection import PromptSelection
from mergeopd.engine.stages import Stages
from mergeopd.engine.teacher_rollouts import FixedText
from mergeopd.recipe.plan import Plan
from mergeopd.recipe.rollout import AnyServerRollout, RolloutSettings
from mergeopd.reporting.events import Event, ServingStats, StageProgress, StageStarted
from mergeopd.rollout.served import ServedEngine
from mergeopd.student.protocol import Student
from mergeopd.types import Rollout

# Interval at which the wait for rounds in flight reports progress.
_POLL_S = 0.2


class RoundPipeline(Protocol):
    """Provides the next round to score and train on."""

    def next(self, progress: Progress) -> CollectedRound:
        """Return the round at `progress`. Collective; raises AbandonRound when a stop was requested."""

    def trained(self, version: int) -> None:
        """Generate with the student's weights after `version` updates from now on. Collective."""

    def use_newest_weights(self) -> None:
        """Make the engine generate with the weights of the last `trained`, at once. Collective."""

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
    selection: PromptSelection
    stages: Stages
    _version: int = field(default=0, init=False)
    _synced: int | None = field(default=None, init=False)  # the version that the engine has
    _parity: ParityGuard = field(init=False)
    _generation_s: float = field(default=0.0, init=False)
    _wait_s: float = field(default=0.0, init=False)
    _sync_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._parity = ParityGuard(self.plan, self.model, self.rollouts, self.stages)

    def next(self, progress: Progress) -> CollectedRound:
        at = phase_at(self.plan, progress.update)
        if at is None:
            raise ValueError(f"the run is complete after {progress.update} updates")
        phase, updates_done = at
        self.selection.prepare(phase, updates_done, self.use_newest_weights)
        tasks = self.text.tasks(phase, updates_done, progress)
        if self._synced is None and any(task.origin == "student" for task in tasks):
            self.use_newest_weights()
        with self.stages.clock.stage("rollout"):
            settings = self.plan.rollout_of(phase)
            rollouts = self._collect(tasks, settings, progress)
            grades = self.rewards.of(rollouts, settings.stop)
        work = self.work(rollouts, progress.round, phase.updates_per_round)
        rewards = [grade.reward for grade in grades]
        failures = {i: v.failure for i, v in enumerate(grades) if v.failure is not None}
        shares, serving = self.text.kept_shares, self._serving(rollouts, progress)
        selected = self.selection.shares(phase)
        return CollectedRound(
            phase, updates_done, rollouts, rewards, work, failures, shares, serving, selected
        )

    def work(self, rollouts: Sequence[Rollout], index: int, num_updates: int) -> RoundSchedule:
        return schedule_round(
            rollouts,
            index,
            num_updates=num_updates,
            max_tokens=self.plan.student.micro_batch_tokens,
            members=self.model.placement.replica_ranks,
            packing=self.plan.student.packing,
        )

    def trained(self, version: int) -> None:
        """Remember the version. Servers get it with the next round, when a request to stop may leave."""
        self._version = version
        if not isinstance(self.plan.rollout, AnyServerRollout):
            self._sync()

    def use_newest_weights(self) -> None:
        # The first time, servers start.
        with self.stages.clock.stage("startup" if self._synced is None else "rollout"):
            self._sync(every=1)

    def close(self) -> None:
        self.rollouts.engine.close()
        self.rewards.close()
        self.rollouts.environments.close()

    def _sync(self, every: int | None = None) -> None:
        """Give the engine the newest weights, if its own are `every` updates old (default: the recipe's)."""
        settings = self.plan.rollout
        if every is None:
            every = settings.sync.every if isinstance(settings, AnyServerRollout) else 1
        if self._synced is None or self._version - self._synced >= every:
            start = time.perf_counter()
            self.rollouts.engine.sync_weights(self.model, self._version)
            if self._synced is not None:  # the first time, servers start
                self._sync_s += time.perf_counter() - start
            self._synced = self._version

    def _is_too_old(self, progress: Progress) -> bool:
        """Whether the engine's weights are too old for a round."""
        settings = self.plan.rollout
        if (
            not isinstance(settings, AnyServerRollout)
            or settings.max_staleness is None
            or self._synced is None
        ):
            return False
        return progress.update - self._synced > settings.max_staleness

    def _collect(self, tasks: Sequence[Task], settings: RolloutSettings, progress: Progress) -> list[Rollout]:
        """Return responses to all tasks, the student's first, each kind in the order of the tasks."""
        return [*self._of_student(tasks, settings, progress), *self.text.of(tasks, settings)]

    def _of_student(
        self, tasks: Sequence[Task], settings: RolloutSettings, progress: Progress
    ) -> list[Rollout]:
        if not any(task.origin == "student" for task in tasks):
            return []
        self._sync(every=1 if self._is_too_old(progress) else None)
        self._compare(tasks, settings)
        start = time.perf_counter()
        rollouts = self.rollouts.generate(tasks, settings)
        self._generation_s = self._wait_s = time.perf_counter() - start
        return rollouts

    def _compare(self, tasks: Sequence[Task], settings: RolloutSettings) -> None:
        """Compare the engine's log-probabilities with the student's, if both have the same weights."""
        prompts = [task.prompt for task in tasks if task.origin == "student"]
        if prompts and self._synced == self._version:
            self._parity.check(prompts, settings, self._version)

    def _serving(self, rollouts: Sequence[Rollout], progress: Progress) -> ServingStats | None:
        """Return what the servers did for a round; None for an engine without servers."""
        engine = self.rollouts.engine
        if not isinstance(engine, ServedEngine):
            return None
        lags = [progress.update - r.policy_version for r in rollouts if r.origin == "student"] or [0]
        gap, counts, sync_s = self._parity.take(), engine.counts(), self._sync_s
        self._sync_s = 0.0
        return ServingStats(
            generation_s=self._generation_s,
            wait_s=self._wait_s,
            sync_s=sync_s,
            lag=sum(lags) / len(lags),
            lag_max=max(lags),
            num_retries=counts.num_retries,
            num_stale=counts.num_stale,
            num_lost=counts.num_lost,
            engine_gap=None if gap is None else gap.mean,
            engine_gap_max=None if gap is None else gap.max,
            engine_kl=None if gap is None else gap.kl,
        )


@dataclass
class _InFlight:
    """A round that is generated while others are trained on; `rollouts` is None beside the first process."""

    round: int
    num_responses: int
    rollouts: Future[list[Rollout]] | None = None
    seconds: float = 0.0

    def run(self, generate: Callable[[], list[Rollout]]) -> list[Rollout]:
        start = time.perf_counter()
        try:
            return generate()
        finally:
            self.seconds = time.perf_counter() - start


@dataclass
class ProgressCounter:
    """A reporter that keeps the number of units done in the last stage."""

    num_done: int = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, StageStarted):
            self.num_done = 0
        elif isinstance(event, StageProgress):
            self.num_done = event.done


@dataclass(frozen=True)
class Background:
    """The student's rollouts for a thread of the first process; `interrupt` ends them."""

    rollouts: StudentRollouts
    interrupt: Interrupt
    progress: ProgressCounter

    def close(self) -> None:
        self.interrupt.requested = "the end of the run"
        self.rollouts.environments.close()


@dataclass
class AheadPipeline(SynchronousPipeline):
    """Generates up to `ahead` rounds on servers while earlier ones are scored and trained on.

    With `ahead` 1 (one-step-off), the servers get new weights between two rounds. With more, rounds are in
    flight then, and continue with the new weights. `max_staleness` of the recipe limits the number of updates
    between the weights that begin a round and those that learn from it first. A run that is resumed generates
    the rounds in flight again: they follow from its progress, so no prompt is lost or trained on twice.
    """

    ahead: int = 1
    open_background: Callable[[], Background] = field(kw_only=True)
    _in_flight: deque[_InFlight] = field(default_factory=deque, init=False)
    _threads: ThreadPoolExecutor | None = field(default=None, init=False)
    _background: Background | None = field(default=None, init=False)

    def use_newest_weights(self) -> None:
        with self.stages.clock.stage("rollout"):
            for one in self._in_flight:
                self._wait(one)
        super().use_newest_weights()

    def close(self) -> None:
        if self._background is not None:
            self._background.close()
        super().close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def _of_student(
        self, tasks: Sequence[Task], settings: RolloutSettings, progress: Progress
    ) -> list[Rollout]:
        if not self._in_flight:
            self._sync(every=1 if self._is_too_old(progress) else None)
            self._compare(tasks, settings)
            self._submit(progress)
        one = self._in_flight.popleft()
        assert one.round == progress.round
        start = time.perf_counter()
        rollouts = self._wait(one)
        self._generation_s, self._wait_s = one.seconds, time.perf_counter() - start
        self._sync()
        self._compare(tasks, settings)
        self._submit_following(progress)
        return rollouts

    def _submit_following(self, progress: Progress) -> None:
        """Start to generate the rounds after `progress`, unless their weights would be too old."""
        newest = self._in_flight[-1].round if self._in_flight else progress.round
        for _ in range(self.ahead):
            phase, _ = phase_at(self.plan, progress.update) or (None, 0)
            assert phase is not None
            progress = Progress(
                progress.update + phase.updates_per_round,
                progress.round + 1,
                progress.drawn + phase.prompts_per_round,
            )
            following = phase_at(self.plan, progress.update)
            if following is None or self._is_too_old(progress):
                return
            # The prompts of a phase that selects them depend on weights that are not there yet.
            if not self.selection.is_ready(following[0]):
                return
            if progress.round > newest:
                self._submit(progress)

    def _submit(self, progress: Progress) -> None:
        at = phase_at(self.plan, progress.update)
        assert at is not None
        phase, updates_done = at
        tasks = draw_tasks(self.text.draw, self.plan, phase, progress, updates_done)
        settings = self.plan.rollout_of(phase)
        num = sum(task.origin == "student" for task in tasks) * settings.samples_per_prompt
        one = _InFlight(progress.round, num)
        if self.stages.ranks.is_first:
            if self._background is None or self._threads is None:
                self._background = self.open_background()
                # Environments serve one round at a time, and so their rounds follow each other.
                num_threads = 1 if self._background.rollouts.environments.settings else self.ahead + 1
                self._threads = ThreadPoolExecutor(num_threads, "mergeopd-rollouts")
            generate = partial(self._background.rollouts.generate, tasks, settings)
            one.rollouts = self._threads.submit(one.run, generate)
        self._in_flight.append(one)

    def _wait(self, one: _InFlight) -> list[Rollout]:
        """Return the responses of a round in flight, on all processes. Collective."""
        on_progress = self.stages.begin("rollout", "the student", one.num_responses, "responses")

        def result() -> list[Rollout]:
            assert one.rollouts is not None
            assert self._background is not None
            while True:
                try:
                    return one.rollouts.result(_POLL_S)
                except TimeoutError:
                    if one.rollouts.done():
                        raise
                on_progress(self._background.progress.num_done)

        return self.stages.ranks.run_on_first(result)
