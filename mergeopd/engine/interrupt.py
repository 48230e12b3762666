"""Requests to stop: SIGTERM (pre-emption) and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mergeopd.ranks import Agreed, Ranks
from mergeopd.report.events import Event, Reporter, StageProgress, StageStarted

_SIGNALS = {signal.SIGINT.name, signal.SIGTERM.name}


class Interrupt:
    """Remembers a request to stop. A second Ctrl-C is an ordinary KeyboardInterrupt, at once."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._num_ctrl_c = 0
        self._is_met = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM inside; handlers can only be set in the main thread.

        After a request of theirs was met, both stay ignored: the process ends, and says that all is saved.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, self._take)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self._is_met else handler)

    def met(self) -> None:
        """Everything is saved: further signals change nothing."""
        self._is_met = self.requested in _SIGNALS

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._num_ctrl_c += number == signal.SIGINT
        if self._num_ctrl_c > 1 and not self._is_met:
            raise KeyboardInterrupt
        self.requested = self.requested or signal.Signals(number).name


class StopNow(Agreed):
    """Leaves a round that has changed no weight yet."""


class Watch:
    """Passes events on; in the middle of a stage it leaves the round when a stop was requested.

    Only while `abandonable`: once an update of the round was made, the round is finished first. Of several
    processes one leaves only where the others do not wait for it, and then all do.
    """

    def __init__(self, reporter: Reporter, interrupt: Interrupt, ranks: Ranks) -> None:
        self._reporter = reporter
        self._interrupt = interrupt
        self._ranks = ranks
        self.abandonable = False

    def emit(self, event: Event) -> None:
        """Report the event, then raise StopNow where that is due and safe."""
        self._reporter.emit(event)
        if (
            self.abandonable
            and self._ranks.is_apart
            and self._interrupt.requested is not None
            and isinstance(event, StageStarted | StageProgress)
        ):
            raise StopNow
