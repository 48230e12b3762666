"""What a tracker does with a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mergeopd.reporting.events import AlarmRaised

Outcome = Literal["finished", "stopped", "failed"]

NO_STEP = -1
"""The last step of a tracker that has no values of the run."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as trackers identify it.

    `id` is random, and the same whenever the run of this folder resumes. `config` is the plan as JSON
    values, `resumed_at` counts the updates done before.
    """

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    resumed_at: int


@dataclass(frozen=True, slots=True)
class Opened:
    """A run that a tracker opened: the last step that it keeps values of, and where people find it."""

    last_step: int
    where: str


class Tracker(Protocol):
    """Writes one run to one tracker. One thread makes all calls; they may block, and raise any exception."""

    title: str

    def start(self, run: TrackedRun) -> Opened:
        """Open the run, or continue the one with the same id."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Store values of a step; steps do not decrease."""

    def alert(self, alarm: AlarmRaised) -> None:
        """Store an alarm, and notify where the tracker can."""

    def summarize(self, values: Mapping[str, float], verdict: str, step: int) -> None:
        """Store the result of the run; `step` is its last one."""

    def finish(self, outcome: Outcome) -> None:
        """Send what is left, and close the run."""
