"""What the terminal shows, gathered from events: no drawing here, and time only as an argument."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from mergeopd.report.events import (
    CheckpointSaved,
    EvaluationDone,
    Event,
    RunFinished,
    RunStarted,
    StageProgress,
    StageStarted,
    UpdateDone,
)

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
class PhasePlace:
    """Where in the phases the run is: `done` of `updates` in the phase `name`."""

    index: int
    name: str
    done: int
    updates: int


@dataclass(slots=True)
class StageView:
    """The present stage."""

    event: StageStarted
    started_at: float
    done: int = 0


@dataclass(slots=True)
class RunView:
    """State of the display; `now` is a monotonic clock in seconds."""

    run: RunStarted | None = None
    started_at: float = 0.0
    last: UpdateDone | None = None
    stage: StageView | None = None
    checkpoint: CheckpointSaved | None = None
    finished: RunFinished | None = None
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)
    trends: dict[tuple[str, str], Trend] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    _phase_index: int = -1
    _last_update_at: float = 0.0
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def apply(self, event: Event, now: float) -> None:
        """Take in an event."""
        match event:
            case RunStarted():
                self.run = event
                self.started_at = self._last_update_at = now
            case StageStarted():
                self.stage = StageView(event, now)
            case StageProgress():
                if self.stage is not None:
                    self.stage.done = event.done
            case UpdateDone():
                self._apply_update(event, now)
            case CheckpointSaved():
                self.checkpoint = event
            case EvaluationDone():
                self.evaluations.setdefault(event.domain, {})[event.model] = event.accuracy
            case RunFinished():
                self.finished = event
                self.stage = None
            case _:
                pass

    def _apply_update(self, event: UpdateDone, now: float) -> None:
        self.stage = None
        self.last = event
        phase = self.phase_of(event.update)
        if phase is not None and phase.index != self._phase_index:
            # Another phase has another speed, other terms and another scale.
            self._phase_index = phase.index
            self._recent.clear()
            self.trends.clear()
            self.phase_seconds.clear()
        self._recent.append((event.num_tokens, event.step_s))
        self._last_update_at = now
        for name, seconds in event.seconds.items():
            self.phase_seconds[name] = self.phase_seconds.get(name, 0.0) + seconds
        for teacher, stats in event.teachers.items():
            known = {name: value for name, value in stats.divergence.items() if value is not None}
            for quantity, value in known.items():
                self.trends.setdefault((teacher, quantity), Trend()).add(value)
        for domain, domain_stats in event.domains.items():
            self.trends.setdefault((domain, "nll"), Trend()).add(domain_stats.nll)

    def phase_of(self, update: int) -> PhasePlace | None:
        """The phase that update number `update` (from 1) belongs to."""
        first = 0
        for index, (name, updates) in enumerate(self.run.phases if self.run else ()):
            if update <= first + updates:
                return PhasePlace(index, name, update - first, updates)
            first += updates
        return None

    @property
    def done(self) -> int:
        """Updates done, those before a resume included."""
        if self.last is not None:
            return self.last.update
        return self.run.resumed_at if self.run else 0

    def left_s(self, now: float) -> float | None:
        """Estimated seconds to the last update, at the present phase's speed; None before the first one."""
        if self.run is None or not self._recent:
            return None
        mean = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return max(0.0, mean * (self.run.num_updates - self.done) - (now - self._last_update_at))

    @property
    def tokens_per_s(self) -> float | None:
        """Response tokens per second of rollout, teachers and update together, lately."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None
