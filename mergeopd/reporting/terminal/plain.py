"""Plain lines for files and pipes: the first and last update of each phase, and others at intervals."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from mergeopd.reporting import events
from mergeopd.reporting.figures import MEASURE_FIGURES, POLICY_FIGURES
from mergeopd.reporting.terminal.glyphs import plain_text
from mergeopd.reporting.terminal.header import header
from mergeopd.reporting.terminal.result import Ending, accuracy_line, alarm_style, alarm_text, percent
from mergeopd.reporting.terminal.timing import clock_text, shares
from mergeopd.reporting.terminal.view import RunView, measure_of

_SHORTEST_S = 5.0
_LONGEST_S = 60.0
_STARTUP_S = 0.5  # shorter stages of the start are not printed
_PRINTED_STAGES = ("export", "text")  # others return with every round, or end with a line of their own


class PlainReporter:
    """Prints lines with the time of day. A context manager as `LiveReporter`, with nothing to restore."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        self._stage: events.StageStarted | None = None
        self._first_at = self._printed_at = self._stage_at = clock()

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def emit(self, event: events.Event) -> None:
        now = self._clock()
        self._view.add(event, now)
        match event:
            case events.RunStarted():
                for label, text in header(event):
                    self._print(f"{label} {text}")
            case events.UpdateDone():
                if self._is_edge(event.update) or self._is_due(now):
                    self._print(self._update_line(event, now))
            case events.StageStarted():
                self._stage, self._stage_at = event, now
                is_late = event.stage == "startup" and now - self._printed_at >= _STARTUP_S
                if event.stage in _PRINTED_STAGES or is_late:
                    self._print(_stage_line(event, 0))
            case events.StageProgress():
                # Where stages are short, the updates themselves show progress.
                is_long = now - self._stage_at >= _SHORTEST_S
                if self._stage is not None and is_long and self._is_due(now):
                    self._print(_stage_line(self._stage, event.done))
            case events.EvaluationDone():
                self._print(f"evaluation {event.model.title} on {event.suite}: {percent(event.accuracy)} %")
            case events.AccuracyMeasured():
                self._print(accuracy_line(event))
            case events.CheckpointSaved():
                self._print(f"saved {event.path}")
            case events.CheckpointSkipped():
                self._print(f"warning: skipped {event.path}: {event.reason}")
            case events.AlarmRaised():
                text = alarm_text(event, with_cause=self._view.is_new(event))
                self._print(f"ALARM {text}", alarm_style(event))
            case events.Note() | events.PromptsSelected():
                self._print(f"note: {event.text}")
            case events.StopRequested():
                self._print(f"{event.signal}: {self._view.stop_text()}")
            case events.RunFinished():
                self._console.print(Ending(event))

    def _is_edge(self, update: int) -> bool:
        """True for the first update since the start and at both ends of a phase."""
        run, phase = self._view.run, self._view.phase_of(update)
        if run is None or phase is None:
            return True
        return update == run.resumed_at + 1 or phase.done in (1, phase.updates)

    def _is_due(self, now: float) -> bool:
        """Whether a line is due: every 5 seconds at first, then less often, down to once a minute."""
        pause = min(_LONGEST_S, max(_SHORTEST_S, (now - self._first_at) / 50))
        return now - self._printed_at >= pause

    def _print(self, text: str, style: str = "") -> None:
        self._printed_at = self._clock()
        line = f"{self._console.get_datetime():%Y-%m-%d %H:%M:%S}  {text}"
        line = plain_text(line, ascii_only=self._console.options.ascii_only)
        self._console.print(Text(line, style=style), soft_wrap=True)

    def _update_line(self, event: events.UpdateDone, now: float) -> str:
        view, last = self._view, self._view.last
        assert last is not None
        total = view.run.num_updates if view.run else event.update
        parts = [f"update {event.update}/{total}", event.phase, f"loss {event.loss:.4f}"]
        measured: dict[str, list[str]] = {}
        for name, numbers in last.teachers.items():
            if measure := measure_of(numbers):
                value = numbers[measure]
                measured.setdefault(MEASURE_FIGURES[measure].column, []).append(
                    f"{name} -" if value is None else f"{name} {value:.4f}"
                )
        parts += [f"{column}: {', '.join(values)}" for column, values in measured.items()]
        rewards = [stats.reward for stats in event.domains.values() if stats.reward is not None]
        if rewards:
            parts.append(f"reward {sum(rewards) / len(rewards):.2f}")
        parts += [f"{f.column} {last.policy[f.key]:.1%}" for f in POLICY_FIGURES if f.column and last.policy]
        parts.append(f"grad {event.grad_norm:.3g}")
        speed, left = view.tokens_per_s, view.left_s(now)
        if speed is not None:
            parts.append(f"{speed:,.0f} tokens/s")
            parts.append(", ".join(f"{name} {part}%" for name, part in shares(view.phase_seconds).items()))
        if left is not None:
            parts.append(f"left {clock_text(left)}")
        return "  ".join(parts)


def _stage_line(event: events.StageStarted, done: int) -> str:
    of_total = f" {done:,}/{event.total:,} {event.unit}".rstrip() if event.total else ""
    return f"{event.stage} {event.detail}".rstrip() + of_total
