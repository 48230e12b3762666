"""Plain lines for files and pipes: the first and last update of each phase, and one now and then."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console, RenderableType
from rich.text import Text

from mergeopd.report.events import (
    CheckpointSaved,
    CheckpointSkipped,
    EvaluationDone,
    Event,
    Note,
    RunFinished,
    RunStarted,
    StageProgress,
    StageStarted,
    UpdateDone,
)
from mergeopd.report.terminal.glyphs import Glyphs, plain_text
from mergeopd.report.terminal.result import ending
from mergeopd.report.terminal.timing import clock_text, shares
from mergeopd.report.terminal.view import RunView

_SHORTEST_S = 5.0
_LONGEST_S = 60.0
_TOLD_STAGES = ("export", "text")  # those of the loop return with every round; evaluations tell their results


class PlainReporter:
    """Prints lines. A context manager like its live sibling, with nothing to give back."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        self._first_at = self._printed_at = self._stage_at = clock()

    def __enter__(self) -> PlainReporter:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def emit(self, event: Event) -> None:
        """Print what the event deserves."""
        now = self._clock()
        self._view.apply(event, now)
        if isinstance(event, StageStarted):
            self._stage_at = now
        match event:
            case RunStarted():
                self._print(_opening(event))
            case UpdateDone():
                if self._is_edge(event.update) or self._is_due(now):
                    self._print(self._update_line(event, now))
            case StageStarted() if event.stage in _TOLD_STAGES:
                self._print(_stage_line(event, 0))
            case StageProgress():
                stage = self._view.stage
                # Where stages are short, the updates themselves tell that something moves.
                is_long = now - self._stage_at >= _SHORTEST_S
                if stage is not None and is_long and self._is_due(now):
                    self._print(_stage_line(stage.event, event.done))
            case EvaluationDone():
                correct = f"{100 * event.accuracy:.1f} % of {event.num_prompts}"
                self._print(f"evaluation {event.model} on {event.domain}: {correct}")
            case CheckpointSaved():
                self._print(f"saved {event.path}")
            case CheckpointSkipped():
                self._print(f"warning: skipped {event.path}: {event.reason}")
            case Note():
                self._print(f"note: {event.text}")
            case RunFinished():
                self._show(ending(event))
            case _:
                pass

    def _is_edge(self, update: int) -> bool:
        """True for the first update since the start and at both ends of a phase."""
        run, phase = self._view.run, self._view.phase_of(update)
        if run is None or phase is None:
            return True
        return update == run.resumed_at + 1 or phase.done in (1, phase.updates)

    def _is_due(self, now: float) -> bool:
        """Every 5 seconds at first, then ever more rarely, down to once a minute."""
        pause = min(_LONGEST_S, max(_SHORTEST_S, (now - self._first_at) / 50))
        return now - self._printed_at >= pause

    def _print(self, text: str) -> None:
        self._show(Text(plain_text(text, Glyphs.of(self._console.options))))

    def _show(self, content: RenderableType) -> None:
        self._printed_at = self._clock()
        self._console.print(content, soft_wrap=isinstance(content, Text))

    def _update_line(self, event: UpdateDone, now: float) -> str:
        view = self._view
        total = view.run.num_updates if view.run else event.update
        parts = [f"update {event.update}/{total}", event.phase, f"loss {event.loss:.4f}"]
        for name, stats in event.teachers.items():
            for value in list(stats.divergence.values())[:1]:
                parts.append(f"{name} -" if value is None else f"{name} {value:.4f}")
        rewards = [stats.reward for stats in event.domains.values() if stats.reward is not None]
        if rewards:
            parts.append(f"reward {sum(rewards) / len(rewards):.2f}")
        if event.policy is not None:
            parts.append(f"clipped {event.policy.clipped_fraction:.1%}")
            parts.append(f"corrected {event.policy.corrected_fraction:.1%}")
        parts.append(f"grad {event.grad_norm:.3g}")
        speed, left = view.tokens_per_s, view.left_s(now)
        if speed is not None:
            parts.append(f"{speed:,.0f} tokens/s")
            parts.append(", ".join(f"{name} {part}%" for name, part in shares(view.phase_seconds).items()))
        if left is not None:
            parts.append(f"left {clock_text(left)}")
        return "  ".join(parts)


def _opening(event: RunStarted) -> str:
    phases = ", ".join(f"{name} {updates}" for name, updates in event.phases)
    begin = f", goes on after update {event.resumed_at}" if event.resumed_at else ""
    return (
        f"{event.name}: {event.num_updates} updates ({phases}){begin}; "
        f"teachers {', '.join(event.teachers)}; output {event.output}"
    )


def _stage_line(event: StageStarted, done: int) -> str:
    of_total = f" {done:,}/{event.total:,} {event.unit}".rstrip() if event.total else ""
    return f"{event.stage} {event.detail}".rstrip() + of_total
