"""The live display of a terminal: one frame, redrawn in place a few times a second."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from mergeopd.reporting import events, figures
from mergeopd.reporting.figures import MEASURE_FIGURES, Figure
from mergeopd.reporting.jsonl import Numbers, UpdateRecord
from mergeopd.reporting.terminal.glyphs import Sparkline, plain_text, sparkline
from mergeopd.reporting.terminal.header import header
from mergeopd.reporting.terminal.result import (
    Ending,
    PartialResultTable,
    accuracy_line,
    alarm_style,
    alarm_text,
)
from mergeopd.reporting.terminal.timing import clock_text, split_line
from mergeopd.reporting.terminal.view import RunView, measure_of

REFRESHES_PER_S = 4
_BAR_AFTER_S = 1.0  # bars of shorter stages would only flicker
_WIDEST, _PADDED = 110, 30
_FIXED_LINES = 7  # run, stage, time, the run's numbers with a gap, and two to spare
_AIMS = {"low": " ↓", "high": " ↑", "zero": " → 0", "": ""}
_LABELS = {"note": "cyan", "warning": "yellow", "SIGINT": "bold yellow", "SIGTERM": "bold yellow"}


class LiveReporter:
    """Draws the run in place; notes stay above the frame. A context manager that restores the terminal."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        self._plain_text = partial(plain_text, ascii_only=console.options.ascii_only)
        self._progress = Progress(
            _Steady(),
            _Bar(),
            _CountAndTimes(self._rest),
            console=console,
            get_time=clock,
            auto_refresh=False,
            expand=True,
        )
        self._run_task: TaskID | None = None
        self._stage_task: TaskID | None = None
        self._stage = ""
        self._is_open = True
        # The refresh thread draws while the run's thread reports. Never print while holding the lock: the
        # refresh thread takes rich's lock first, then this one.
        self._lock = threading.Lock()
        self._live = Live(
            get_renderable=self._frame,
            console=console,
            refresh_per_second=REFRESHES_PER_S,
            vertical_overflow="crop",
        )

    def __enter__(self) -> LiveReporter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._end_stage()
            self._is_open = False
            if self._run_task is None:
                self._live.transient = True  # nothing to keep, such as a table of accuracies
        self._live.stop()

    def emit(self, event: events.Event) -> None:
        """Record the event; the next refresh shows it. Notes and the result are printed at once."""
        with self._lock:
            self._view.add(event, self._clock())
            self._move_bars(event)
        match event:
            case events.Note() | events.PromptsSelected():
                self._print("note", event.text)
            case events.AccuracyMeasured():
                self._print("eval", accuracy_line(event))
            case events.AlarmRaised():
                text = alarm_text(event, with_cause=self._view.is_new(event))
                self._print("ALARM", text, alarm_style(event))
            case events.CheckpointSkipped():
                self._print("warning", f"skipped {event.path}: {event.reason}")
            case events.StopRequested():
                self._print(event.signal, self._view.stop_text())
            case events.RunStarted():
                for label, text in header(event):
                    self._print(label, text)
            case events.RunFinished():
                self._live.stop()
                self._console.print()
                self._console.print(Ending(event))
            case _ if not self._live.is_started:
                self._live.start()

    def _print(self, label: str, text: str, style: str | None = None) -> None:
        """Print a line, or a paragraph indented after its label, above the frame."""
        rows = Table.grid(padding=(0, 1, 0, 0))
        rows.add_column(no_wrap=True, min_width=8, style=style or _LABELS.get(label, "dim"))
        rows.add_row(label, Text(self._plain_text(text), overflow="fold"))
        self._console.print(rows)

    def _rest(self) -> str:
        if self._view.stop is not None and self._is_open:
            return ", stopping"
        left = self._view.left_s(self._clock()) if self._is_open else None
        return "" if left is None else f", about {clock_text(left)} left"

    def _move_bars(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self._end_stage()
                self._run_task = self._progress.add_task("", total=event.num_updates, unit="updates")
                self._progress.tasks[-1].start_time = self._clock() - event.seconds
                self._show_position(event)
            case events.StageStarted():
                self._begin_stage(event)
            case events.StageProgress() if self._stage_task is not None:
                self._progress.update(self._stage_task, completed=event.done)
            case events.UpdateDone():
                self._stage = ""  # shown until the next one begins
                if self._view.run is not None:
                    self._show_position(self._view.run)
            case events.RunFinished():
                self._end_stage()

    def _begin_stage(self, event: events.StageStarted) -> None:
        """Show the stage in place of the last one; the time of stages with one name is counted together."""
        before = next((task for task in self._progress.tasks if task.id == self._stage_task), None)
        began = before.start_time if before is not None and self._stage == event.stage else None
        self._end_stage()
        what = self._plain_text(f"{event.stage}  {event.detail}".rstrip())
        self._stage, total = event.stage, event.total or None
        self._stage_task = self._progress.add_task(what, total=total, unit=event.unit)
        if began is not None:
            self._progress.tasks[-1].start_time = began

    def _end_stage(self) -> None:
        if self._stage_task is not None:
            self._progress.remove_task(self._stage_task)
            self._stage_task = None

    def _show_position(self, run: events.RunStarted) -> None:
        assert self._run_task is not None
        title, done = run.name, self._view.done
        phase = self._view.phase_of(min(done + 1, run.num_updates))
        if phase is not None and len(run.phases) > 1:
            in_phase = phase.done - (done < run.num_updates)  # `phase` is that of the next update
            title += f" · {phase.name} {in_phase}/{phase.updates}"
        self._progress.update(self._run_task, completed=done, description=self._plain_text(title))

    def _frame(self) -> RenderableType:
        width, height = self._console.size
        width = min(width, _WIDEST)
        with self._lock:
            return Constrain(Group(*self._parts(width, height)), width)

    def _parts(self, width: int, height: int) -> list[RenderableType]:
        view = self._view
        parts: list[RenderableType] = [self._progress.make_tasks_table(self._progress.tasks)]
        if self._stage_task is None and self._run_task is not None:
            parts.append(Text())  # the frame keeps its height
        if view.evaluations and not view.is_finished:
            return [*parts, Text(), PartialResultTable(view.evaluations)]
        if view.last is not None:
            parts += self._numbers(view.last, width, height - _FIXED_LINES)
        return parts

    def _numbers(self, last: UpdateRecord, width: int, room: int) -> list[RenderableType]:
        """Return tables of teachers and domains in at most `room` lines, the run's numbers, and a legend."""
        view = self._view
        measure = next((key for key in map(measure_of, last.teachers.values()) if key), None)
        of_teachers = [figure for figure in figures.TEACHER_FIGURES if figure.column] + [figures.NUM_TOKENS]
        of_teachers = [MEASURE_FIGURES[measure], *of_teachers] if measure else of_teachers
        of_domains = view.columns(figures.DOMAIN_FIGURES)
        lines = max(0, room - (4 if last.teachers else 2))
        half = lines // 2 if last.teachers else lines
        for_domains = min(len(last.domains), max(half, lines - len(last.teachers)))
        for_teachers = min(len(last.teachers), lines - for_domains)
        parts: list[RenderableType] = []
        if for_teachers > 0:
            parts += [Text(), self._table("teacher", last.teachers, of_teachers, measure_of, for_teachers)]
        if for_domains > 0:
            trend = None if last.teachers else lambda _: "nll"
            parts += [Text(), self._table("domain", last.domains, of_domains, trend, for_domains)]
        parts += [Text(), self._run_line(last, width)]
        parts += filter(
            None, [split_line(view.phase_seconds, width, ascii_only=self._console.options.ascii_only)]
        )
        explained = [*of_teachers[:-1], *of_domains] if last.teachers else of_domains
        notes = [(figure.column, figure.legend or figure.subtitle) for figure in explained]
        notes.append((self._plain_text("↓ ↑ → 0"), "the good direction"))
        legend = Text("  ").join(
            Text.assemble(column, (f" {self._plain_text(text)}", "dim")) for column, text in notes
        )
        if 1 + len(legend.wrap(self._console, width)) <= lines - for_teachers - for_domains:
            parts += [Text(), legend]
        return parts

    def _table(
        self,
        kind: str,
        rows: Mapping[str, Numbers],
        columns: Sequence[Figure],
        trend: Callable[[Numbers], str] | None,
        lines: int,
    ) -> Table:
        """Return a row per teacher or domain in `lines` lines, with the history of the figure `trend`."""
        table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        table.add_column(kind, no_wrap=True, overflow="ellipsis", min_width=8, max_width=24)
        for figure in columns:
            aim = self._plain_text(_AIMS[figure.aim])
            table.add_column(figure.column + aim, justify="right", no_wrap=True)
        if trend is not None:
            table.add_column("from", justify="right", no_wrap=True, style="dim")
            table.add_column("trend", style="cyan")
        shown = list(rows) if len(rows) <= lines else list(rows)[: lines - 1]
        for name in shown:
            cells: list[RenderableType] = [_cell(figure, rows[name]) for figure in columns]
            if trend is not None:
                history = self._view.trends[name, trend(rows[name])]
                cells += [_number(history[0] if history else None, ""), Sparkline(history)]
            table.add_row(Text(self._plain_text(name)), *cells)
        if len(shown) < len(rows):
            table.add_row(Text(f"and {len(rows) - len(shown)} more", style="dim"))
        return table

    def _run_line(self, last: UpdateRecord, width: int) -> Text:
        """Return the run's numbers; the least important are left out if the line is too long."""
        view = self._view
        pairs = {
            figure.column: _number(figures.run_value(last, figure.key), figure.unit)
            for figure in view.columns(figures.RUN_FIGURES)
        }
        if "loss" in pairs and len(view.losses) > 1:
            history = self._plain_text(sparkline(view.losses, 8))
            pairs["loss"].append(f" {history}", "cyan")
        if view.tokens_per_s is not None:
            pairs["tokens/s"] = Text(f"{view.tokens_per_s:,.0f}")
        if view.saved_at is not None:
            pairs["saved at"] = Text(f"update {view.saved_at}")
        by_importance = ("loss", "saved at", "grad", "tokens/s", "lr", "on-policy")
        for label in [*reversed([k for k in pairs if k not in by_importance]), *reversed(by_importance)]:
            line = Text("   ", no_wrap=True, overflow="ellipsis").join(
                Text.assemble((f"{label} ", "dim"), value) for label, value in pairs.items()
            )
            if len(line) <= width or len(pairs) == 1:
                break
            pairs.pop(label, None)
        return line


class _Steady(ProgressColumn):
    """A column of text that never becomes narrower, so that the bar beside it does not move."""

    def __init__(self) -> None:
        super().__init__(_one_line())
        self._width = 0

    def text(self, task: Task) -> Text:
        return Text(task.description)

    def render(self, task: Task) -> Text:
        text = self.text(task)
        self._width = min(_PADDED, max(self._width, len(text)))
        text.pad_right(self._width - len(text))
        return text


class _CountAndTimes(_Steady):
    """`64/256 responses  0:02`; for the run with `rest()`, such as the time left."""

    def __init__(self, rest: Callable[[], str]) -> None:
        super().__init__()
        self._rest = rest

    def text(self, task: Task) -> Text:
        is_run = task.fields["unit"] == "updates"
        count = f"{int(task.completed):,}/{int(task.total):,} {task.fields['unit']}" if task.total else ""
        rest = self._rest() if is_run and not task.finished else ""
        elapsed = clock_text(task.elapsed or 0.0)
        return Text.assemble(count, "  " if count else "", (f"{elapsed}{rest}", "dim"))


class _Bar(ProgressColumn):
    """A bar; none for stages that have just begun or whose length is unknown."""

    def __init__(self) -> None:
        super().__init__(Column(ratio=1))
        self._bar = BarColumn(None)

    def render(self, task: Task) -> RenderableType:
        is_long = task.fields["unit"] == "updates" or (task.elapsed or 0.0) >= _BAR_AFTER_S
        return self._bar.render(task) if task.total and is_long else Text()


def _one_line() -> Column:
    return Column(no_wrap=True, overflow="ellipsis")


def _cell(figure: Figure, numbers: Numbers) -> Text:
    own = measure_of(numbers)
    if figure.key in MEASURE_FIGURES and figure.key not in numbers and own:  # a bridge has its own measure
        return _number(numbers[own], figure.unit).append(f" {MEASURE_FIGURES[own].column}", "dim")
    return _number(numbers.get(figure.key), figure.unit)


def _number(value: float | None, unit: str) -> Text:
    if value is None:
        return Text()
    if not math.isfinite(value):
        return Text(str(value), style="bold red")
    if isinstance(value, int):
        return Text(f"{value:,}")
    if unit == "%":
        return Text(f"{100 * value:.0f} %")
    if unit == "tokens":
        return Text(f"{value:.1f}")
    if value != 0 and abs(value) < 1e-3:
        return Text(f"{value:.1e}")
    return Text(f"{value:.4f}" if abs(value) < 100 else f"{value:.4g}")
