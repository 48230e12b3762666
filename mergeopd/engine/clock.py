"""Wall time by stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

_log = logging.getLogger(__name__)


class Clock:
    """Wall time per stage since the last lap, and over the run, including interrupted processes."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._before: dict[str, float] = {}
        self._lap: dict[str, float] = {}
        self._total: dict[str, float] = {}

    def continue_from(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of the run so far, as returned by `seconds()` for a checkpoint."""
        self._before = dict(seconds)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the time inside the context under `name`. Stages do not nest."""
        _log.info("%s", name)
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            _log.debug("%s took %.3f s", name, seconds)
            self._lap[name] = self._lap.get(name, 0.0) + seconds
            self._total[name] = self._total.get(name, 0.0) + seconds

    def lap(self) -> dict[str, float]:
        """Return seconds per stage since the last call."""
        lap, self._lap = self._lap, {}
        return lap

    def seconds(self) -> dict[str, float]:
        """Return seconds per stage over the run, and in `total` all wall time, including between stages."""
        now = {**self._total, "total": time.perf_counter() - self._started}
        return {name: self._before.get(name, 0.0) + now.get(name, 0.0) for name in {**self._before, **now}}
