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
    phase, `trends` the history of the phase by teacher or domain and key, `losses` that of the loss. `stop`
    is the signal that asked to stop.
    """

    run: events.RunStarted | None = None
    last: UpdateRecord | None = None
    saved_at: int | None = None
    stage: events.StageStarted | None = None
    stop: str | None = None
    is_finished: bool = False
    evaluations: dict[str, dict[Kind, Estimate | None]] = field(default_factory=dict)
    informative: set[str] = field(default_factory=set)
    trends: defaultdict[tuple[str, str], array[float]] = field(
        default_factory=lambda: defaultdict(lambda: array("d"))
    )
    losses: array[float] = field(default_factory=lambda: array("d"))
    phase_seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _alarms: set[str] = field(default_factory=set)
    _phase: str = ""
    _last_update_at: float = 0.0
    _recent: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_WINDOW))

    def add(self, event: events.Event, now: float) -> None:
        match event:
            case events.RunStarted():
                self.run = event
                self.saved_at = event.resumed_at or None
                for record in event.history:
                    self._add_update(record)
                self._last_update_at = now
            case events.UpdateDone():
                self._add_update(UpdateRecord.of(event))
                self._last_update_at = now
            case events.StageStarted():
                self.stage = event
            case events.StopRequested():
                self.stop = self.stop or event.signal
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
        """Keep a suite's base, its own expert, its best static merge and control, and the student."""
        row, kind = self.evaluations.setdefault(event.suite, {}), event.model.kind
        if kind == "expert" and not event.is_own_expert:
            return
        best = row.get(kind)
        is_one_of_several = kind in ("static_merge", "control")
        if not is_one_of_several or best is None or (event.accuracy.value or 0.0) > (best.value or 0.0):
            row[kind] = event.accuracy

    def _add_update(self, record: UpdateRecord) -> None:
        self.last = record
        if record.phase != self._phase:
            # Speed, terms and scale differ between phases.
            self._phase = record.phase
            for of_phase in (self._recent, self.trends, self.phase_seconds, self.informative):
                of_phase.clear()
            self.losses = array("d")
        self._recent.append((record.num_tokens, events.step_s(record.cost.seconds)))
        for name, seconds in record.cost.seconds.items():
            self.phase_seconds[name] += seconds
        if record.loss is not None and math.isfinite(record.loss):
            self.losses.append(record.loss)
        for name, numbers in (*record.teachers.items(), *record.domains.items()):
            for key in numbers.keys() & {"nll", *MEASURE_FIGURES}:
                if (value := numbers[key]) is not None and math.isfinite(value):
                    self.trends[name, key].append(value)
        for numbers in record.domains.values():
            self.informative |= {f.key for f in DOMAIN_FIGURES if f.is_informative(numbers.get(f.key))}
        self.informative |= {f.key for f in RUN_FIGURES if f.is_informative(run_value(record, f.key))}

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
        last = self.last.update if self.last else 0
        return max(last, self.run.resumed_at if self.run else 0)

    def left_s(self, now: float) -> float | None:
        """Estimate the seconds to the last update at the current phase's speed.

        None before the first update, and once a stop was requested.
        """
        if self.run is None or not self._recent or self.stop is not None:
            return None
        mean = sum(seconds for _, seconds in self._recent) / len(self._recent)
        return max(0.0, mean * (self.run.num_updates - self.done) - (now - self._last_update_at))

    def stop_text(self) -> str:
        """Say what happens after the request to stop, and what a second Ctrl-C does."""
        done = self.done
        is_trained = self.stage is not None and self.stage.stage in ("export", "evaluation")
        if is_trained:
            text = "stopping; training is saved"
        elif not done:
            text = "stopping as soon as possible; no update is complete yet"
        elif self.saved_at == done:
            text = f"stopping as soon as possible; the {done} updates made are saved"
        else:
            text = "stopping as soon as possible, with a checkpoint of the updates made"
        if self.stop != "SIGINT":
            return f"{text}."
        text += ". Ctrl-C again stops at once"
        if not is_trained and self.saved_at != done and done:
            kept = f"after update {self.saved_at}" if self.saved_at else "from the beginning"
            text += f", and the run then resumes {kept}"
        return f"{text}."

    @property
    def tokens_per_s(self) -> float | None:
        """Return response tokens per second of rollout, teachers and update, over recent updates."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None


def measure_of(numbers: Numbers) -> str:
    """Return the key of a teacher's first divergence, or of its bridge's measure; "" without one."""
    return next((key for key in MEASURE_FIGURES if key in numbers), "")
