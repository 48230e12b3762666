"""Stages of a round: time, progress, and the points between units of work at which a run may stop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergeopd.distributed.communicator import Communicator
from mergeopd.engine.clock import Clock
from mergeopd.engine.interrupt import StopGuard
from mergeopd.reporting.events import Note, Reporter, StageName, StageProgress, StageStarted


@dataclass(frozen=True)
class Stages:
    """Reports stages. `guard` is None where started work must be finished."""

    reporter: Reporter
    clock: Clock
    ranks: Communicator
    guard: StopGuard | None

    def begin(self, stage: StageName, detail: str, total: int, unit: str) -> Callable[[int], None]:
        """Report the start of a stage of `total` units; return a callback that reports progress.

        Its argument counts the units done by this process. Both raise AbandonRound when a stop was requested
        and is possible.
        """
        self.reporter.emit(StageStarted(stage, detail, total, unit))
        self.check()

        def on_progress(num_own: int) -> None:
            self.reporter.emit(StageProgress(min(total, num_own * self.ranks.size)))
            self.check()

        return on_progress

    def note(self, text: str) -> None:
        """Report a remark for the user."""
        self.reporter.emit(Note(text))

    def check(self, num_done: int = 0) -> None:
        """Raise AbandonRound when a stop was requested and is possible."""
        if self.guard is not None:
            self.guard.check()
