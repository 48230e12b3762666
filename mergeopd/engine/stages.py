"""Stages of a round: time, progress, and the points between units of work at which a run may stop."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from mergeopd.distributed.communicator import Communicator
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import StopGuard
from mergeopd.reporting.events import Reporter, StageName, StageProgress, StageStarted


class Stages:
    """Measures and reports stages. `guard` is None where started work must be finished."""

    def __init__(
        self, reporter: Reporter, clock: Clock, ranks: Communicator, guard: StopGuard | None
    ) -> None:
        self.reporter = reporter
        self.clock = clock
        self._ranks = ranks
        self._guard = guard

    def uninterrupted(self) -> Stages:
        """Return the same stages without points at which the run may stop."""
        return Stages(self.reporter, self.clock, self._ranks, None)

    def timed(self, stage: str) -> AbstractContextManager[None]:
        """Count the time inside the context under `stage`."""
        return self.clock.stage(stage)

    def begin(self, stage: StageName, detail: str, total: int, unit: str) -> Callable[[int], None]:
        """Report the start of a stage of `total` units; return a callback that reports progress.

        Its argument counts the units done by this process. Both raise AbandonRound when a stop was requested
        and is possible.
        """
        self.reporter.emit(StageStarted(stage, detail, total, unit))
        self._check()

        def on_progress(num_own: int) -> None:
            self.reporter.emit(StageProgress(min(total, num_own * self._ranks.size)))
            self._check()

        return on_progress

    def _check(self) -> None:
        if self._guard is not None:
            self._guard.check()
