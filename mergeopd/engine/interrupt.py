"""Requests to stop: SIGTERM (pre-emption) and Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mergeopd.distributed.ranks import Agreed, Ranks


class Interrupt:
    """Remembers a request to stop. A second Ctrl-C is an ordinary KeyboardInterrupt, at once."""

    def __init__(self) -> None:
        self.requested: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM inside; handlers can only be set in the main thread."""
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
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name


class AbandonRound(Agreed):
    """Leaves a round that has changed no weight yet."""


class StopGuard:
    """Carries out requests to stop between units of work that can be repeated."""

    def __init__(self, interrupt: Interrupt, ranks: Ranks) -> None:
        self._interrupt = interrupt
        self._ranks = ranks

    @property
    def requested(self) -> str | None:
        """What asked this process to stop: a signal's name, an option, or None."""
        return self._interrupt.requested

    def request(self, by: str) -> None:
        """Ask to stop at the end of the round."""
        self._interrupt.requested = by

    def check(self) -> None:
        """Raise AbandonRound where a stop was requested and no other process is waiting for this one."""
        if self._interrupt.requested is not None and self._ranks.is_apart:
            raise AbandonRound

    def is_requested_anywhere(self) -> bool:
        """Whether any process was asked to stop; then all of them are. Collective."""
        asked = [request for request in self._ranks.gather(self._interrupt.requested) if request]
        self._interrupt.requested = asked[0] if asked else None
        return bool(asked)
