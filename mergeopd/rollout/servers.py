"""Servers of a run: running ones, or some that it starts and watches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from mergeopd.serving.launch import ServerLaunch, ServerProcess

_log = logging.getLogger(__name__)
# Interval at which progress is reported.
_POLL_S = 0.2


class Servers(Protocol):
    """Servers of a run: running ones, or some that the run starts."""

    @property
    def num_to_start(self) -> int:
        """Number of servers that `start` starts."""

    def start(self, on_progress: Callable[[int], None]) -> Sequence[str]:
        """Return their addresses when all are ready; `on_progress` gets how many are, and may raise."""

    def check(self, while_waiting: Callable[[], None]) -> None:
        """Restart a server that has crashed; `while_waiting` may raise to leave.

        Raises ServingError when it crashed before.
        """

    def close(self) -> None:
        """Stop the servers that the run has started."""


@dataclass(frozen=True)
class RunningServers:
    """Servers that somebody else has started."""

    urls: Sequence[str]
    num_to_start: ClassVar[int] = 0

    def start(self, on_progress: Callable[[int], None]) -> Sequence[str]:
        return self.urls

    def check(self, while_waiting: Callable[[], None]) -> None:
        """Do nothing: lost servers are noticed by their requests."""

    def close(self) -> None:
        """Do nothing: others may use them."""


@dataclass
class LaunchedServers:
    """Servers that the run starts, all at once; `start_timeout_s` is for each."""

    launches: Sequence[ServerLaunch]
    start_timeout_s: float
    _processes: list[ServerProcess] = field(default_factory=list, init=False)
    _checking: threading.Lock = field(default_factory=threading.Lock, init=False)
    _while_waiting: Callable[[], None] | None = field(default=None, init=False)

    @property
    def num_to_start(self) -> int:
        return len(self.launches)

    def start(self, on_progress: Callable[[int], None]) -> Sequence[str]:
        self._processes = [ServerProcess(one, self.start_timeout_s, self._on_wait) for one in self.launches]
        with ThreadPoolExecutor(len(self._processes)) as threads:
            starts = [threads.submit(one.start) for one in self._processes]
            try:
                while pending := [start for start in starts if not start.done()]:
                    on_progress(len(starts) - len(pending))
                    wait(pending, _POLL_S, FIRST_EXCEPTION)
                for start in starts:
                    start.result()
            except BaseException:
                self.close()
                raise
        return [one.url for one in self._processes]

    def check(self, while_waiting: Callable[[], None]) -> None:
        if not self._checking.acquire(blocking=False):
            return  # another thread that waits for responses is at it
        try:
            self._while_waiting = while_waiting
            for one in self._processes:
                if one.ensure_running():
                    _log.warning("restarted the inference server at %s", one.url)
        finally:
            self._checking.release()

    def close(self) -> None:
        for one in self._processes:
            one.stop()

    def _on_wait(self, _: float) -> None:
        if self._while_waiting is not None:
            self._while_waiting()
