"""State of the terminal display, collected from events, without drawing; time is an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mergeopd.reporting import events
from mergeopd.reporting.figures import DOMAIN_FIGURES, MEASURE_FIGURES, RUN_FIGURES, Figure, run_value
from mergeopd.reporting.jsonl import Numbers, UpdateRecord

_WINDOW = 32  # updates over which speed is averaged: several rounds, so that their bursts even out
_TREND_POINTS = 256


class Trend:
    """A history of any length in bounded memory: when it is full, neighbours are averaged."""

    def __init__(self) -> None:
        self.points: list[float] = []
        self._stride = 1
        self._sum = 0.0
        self._count = 0

    def add(self, value: float) -> None:
        """Append a value; one that is not finite is left out."""
        if value - value != 0.0:
            return
        self._sum += value
        self._count += 1
        if self._count < self._stride:
            return
        self.points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.points) == _TREND_POINTS:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(a + b) / 2 for a, b in pairs]
            self._stride *= 2


@dataclass(frozen=True, slots=True)
class PhasePosition:
    """A position in the phases: `done` of `updates` in the phase `name`."""

    index: int
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
    evaluations: dict[str, dict[str, float | None]] = field(default_factory=dict)
    informative: set[str] = field(default_factory=set)
    trends: dict[tuple[str, str], Trend] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    _phase_index: int = -1
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
                self.evaluations.setdefault(event.domain, {})[event.model] = event.accuracy
            case events.CheckpointSaved():
                self.saved_at = event.update
            case events.RunFinished():
                self.is_finished = True

    def _add_update(self, event: events.UpdateDone, now: float) -> None:
        self.last = UpdateRecord.of(event)
        phase = self.phase_of(event.update)
        if phase is not None and phase.index != self._phase_index:
            # Speed, terms and scale differ between phases.
            self._phase_index = phase.index
            for of_phase in (self._recent, self.trends, self.phase_seconds, self.informative):
                of_phase.clear()
        self._recent.append((event.num_tokens, event.step_s))
        self._last_update_at = now
        for name, seconds in event.seconds.items():
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        for name, numbers in (*self.last.teachers.items(), *self.last.domains.items()):
            for key in numbers.keys() & {"nll", *MEASURE_FIGURES}:
                if (value := numbers[key]) is not None:
                    self.trends.setdefault((name, key), Trend()).add(value)
        for numbers in self.last.domains.values():
            self.informative |= {f.key for f in DOMAIN_FIGURES if f.is_informative(numbers.get(f.key))}
        self.informative |= {f.key for f in RUN_FIGURES if f.is_informative(run_value(self.last, f.key))}

    def columns(self, figures: tuple[Figure, ...]) -> list[Figure]:
        """Return the `figures` that the terminal shows now."""
        return [figure for figure in figures if figure.column and figure.key in self.informative]

    def phase_of(self, update: int) -> PhasePosition | None:
        """Return the phase of update number `update` (from 1)."""
        first = 0
        for index, (name, updates) in enumerate(self.run.phases if self.run else ()):
            if update <= first + updates:
                return PhasePosition(index, name, update - first, updates)
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
