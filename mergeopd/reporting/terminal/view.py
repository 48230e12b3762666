"""State of the terminal display, collected from events, without drawing; time is an argument."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from mergeopd.reporting import events
from mergeopd.reporting.figures import DOMAIN_FIGURES, MEASURE_FIGURES, RUN_FIGURES, Figure, run_value
from mergeopd.reporting.jsonl import Numbers, UpdateRecord
from mergeopd.reporting.result import Estimate, Kind

_WINDOW = 32  # updates over which speed is averaged: several rounds, so that their bursts even out


class PhasePosition(NamedTuple):
    """A position in the phases: `done` of `updates` in the phase `name`."""

    name: str
    done: int
    updates: int


@dataclass(slots=True)
class RunView:
    """State of the display; `now` is a monotonic clock in seconds.

    `informative` has the keys of the domain and run figures that differed from `hidden_when_constant` in this
    phase, `trends` the history of the phase by teacher or domain and key.
    """

    run: events.RunStarted | None = None
    last: UpdateRecord | None = None
    saved_at: int | None = None
    is_finished: bool = False
    evaluations: dict[str, dict[Kind, Estimate | None]] = field(default_factory=dict)
    informative: set[str] = field(default_factory=set)
    trends: defaultdict[tuple[str, str], array[float]] = field(
        default_factory=lambda: defaultdict(lambda: array("d"))
    )
    phase_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _alarms: set[str] = field(default_factory=set)
    _phase: str = ""
    _last_update_at: float = 0.0
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def add(self, event: events.Event, now: float) -> None:
        match event:
            case events.RunStarted():
                self.run = event
                self._last_update_at = now
            case events.UpdateDone():
                self._add_update(event, now)
            case events.EvaluationDone():
                self._add_evaluation(event)
            case events.CheckpointSaved():
                self.saved_at = event.update
            case events.RunFinished():
                self.is_finished = True

    def is_new(self, alarm: events.AlarmRaised) -> bool:
        """Whether an alarm of this name is shown for the first time."""
        is_new = alarm.name not in self._alarms
        self._alarms.add(alarm.name)
        return is_new

    def _add_evaluation(self, event: events.EvaluationDone) -> None:
        """Keep a suite's base, its own expert, its best static merge and the student."""
        row, kind = self.evaluations.setdefault(event.suite, {}), event.model.kind
        if kind == "expert" and not event.is_own_expert:
            return
        best = row.get(kind)
        if kind != "static_merge" or best is None or (event.accuracy.value or 0.0) > (best.value or 0.0):
            row[kind] = event.accuracy

    def _add_update(self, event: events.UpdateDone, now: float) -> None:
        self.last = UpdateRecord.of(event)
        if event.phase != self._phase:
            # Speed, terms and scale differ between phases.
            self._phase = event.phase
            for of_phase in (self._recent, self.trends, self.phase_seconds, self.informative):
                of_phase.clear()
        self._recent.append((event.num_tokens, event.step_s))
        self._last_update_at = now
        for name, seconds in event.seconds.items():
            self.phase_seconds[name] += seconds
        for name, numbers in (*self.last.teachers.items(), *self.last.domains.items()):
            for key in numbers.keys() & {"nll", *MEASURE_FIGURES}:
                if (value := numbers[key]) is not None and math.isfinite(value):
                    self.trends[name, key].append(value)
        for numbers in self.last.domains.values():
            self.informative |= {f.key for f in DOMAIN_FIGURES if f.is_informative(numbers.get(f.key))}
        self.informative |= {f.key for f in RUN_FIGURES if f.is_informative(run_value(self.last, f.key))}

    def columns(self, figures: tuple[Figure, ...]) -> list[Figure]:
        """Return the `figures` that the terminal shows now."""
        return [figure for figure in figures if figure.column and figure.key in self.informative]

    def phase_of(self, update: int) -> PhasePosition | None:
        """Return the phase of update number `update` (from 1)."""
        first = 0
        for name, updates in self.run.phases if self.run else ():
            if update <= first + updates:
                return PhasePosition(name, update - first, updates)
            first += updates
        return None

    @property
    def done(self) -> int:
        """Updates done, those before a resume included."""
        if self.last is not None:
            return self.last.update
        return self.run.resumed_at if self.run else 0

    def left_s(self, now: float) -> float | None:
        """Estimate the seconds to the last update at the current phase's speed; None before the first one."""
        if self.run is None or not self._recent:
            return None
        mean = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return max(0.0, mean * (self.run.num_updates - self.done) - (now - self._last_update_at))

    @property
    def tokens_per_s(self) -> float | None:
        """Return response tokens per second of rollout, teachers and update, over recent updates."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None


def measure_of(numbers: Numbers) -> str:
    """Return the key of a teacher's first divergence, or of its bridge's measure; "" without one."""
    return next((key for key in MEASURE_FIGURES if key in numbers), "")
