"""The live display of a terminal: one frame, redrawn in place a few times a second."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text

from mergeopd.reporting import events, figures
from mergeopd.reporting.figures import MEASURE_FIGURES, Figure
from mergeopd.reporting.jsonl import Numbers, UpdateRecord
from mergeopd.reporting.terminal.glyphs import Sparkline, plain_text
from mergeopd.reporting.terminal.result import Ending, PartialResultTable, alarm_style, alarm_text
from mergeopd.reporting.terminal.timing import clock_text, split_line
from mergeopd.reporting.terminal.view import RunView, measure_of

REFRESHES_PER_S = 4
_STAGE_AFTER_S = 2.0  # shorter stages would only flicker
_WIDEST = 110
_FIXED_LINES = 7  # run, stage, time, the run's numbers with a gap, and two to spare


class LiveReporter:
    """Draws the run in place; notes stay above the frame. A context manager that restores the terminal."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._console = console
        self._clock = clock
        self._view = RunView()
        self._plain_text = partial(plain_text, ascii_only=console.options.ascii_only)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False, table_column=_one_line()),
            BarColumn(None, table_column=Column(ratio=1)),
            _CountAndTimes(lambda: self._view.left_s(clock())),
            console=console,
            get_time=clock,
            auto_refresh=False,
            expand=True,
        )
        self._run_task: TaskID | None = None
        self._stage_task: TaskID | None = None
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
        self._live.stop()

    def emit(self, event: events.Event) -> None:
        """Record the event; the next refresh shows it. Notes and the result are printed at once."""
        with self._lock:
            self._view.add(event, self._clock())
            self._move_bars(event)
        match event:
            case events.Note():
                self._print("note", "cyan", event.text)
            case events.AlarmRaised():
                self._print(
                    "ALARM", alarm_style(event), alarm_text(event, with_cause=self._view.is_new(event))
                )
            case events.CheckpointSkipped():
                self._print("warning", "yellow", f"skipped {event.path}: {event.reason}")
            case events.RunFinished():
                self._live.stop()
                self._console.print()
                self._console.print(Ending(event))
            case _ if not self._live.is_started:
                self._live.start()

    def _print(self, label: str, style: str, text: str) -> None:
        self._console.print(Text.assemble((f"{label:<8}", style), self._plain_text(text)))

    def _move_bars(self, event: events.Event) -> None:
        match event:
            case events.RunStarted():
                self._run_task = self._progress.add_task("", total=event.num_updates, unit="updates")
                self._show_position(event)
            case events.StageStarted():
                self._end_stage()
                what = self._plain_text(f"{event.stage}  {event.detail}".rstrip())
                total = event.total or None
                self._stage_task = self._progress.add_task(what, total=total, unit=event.unit, visible=False)
            case events.StageProgress() if self._stage_task is not None:
                self._progress.update(self._stage_task, completed=event.done)
            case events.UpdateDone() | events.RunFinished():
                self._end_stage()
                if self._view.run is not None:
                    self._show_position(self._view.run)

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
        tasks = self._progress.tasks
        for task in tasks:
            task.visible = task.id == self._run_task or (task.elapsed or 0.0) >= _STAGE_AFTER_S
        parts: list[RenderableType] = [self._progress.make_tasks_table(tasks)]
        if self._stage_task is None or not tasks[-1].visible:
            parts.append(Text())  # the frame keeps its height
        view = self._view
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
        parts += [Text(), self._run_line(last)]
        parts += filter(
            None, [split_line(view.phase_seconds, width, ascii_only=self._console.options.ascii_only)]
        )
        explained = [*of_teachers, *of_domains] if last.teachers else of_domains
        legend = Text("   ").join(
            Text.assemble(figure.column, (f" {self._plain_text(figure.subtitle)}", "dim"))
            for figure in explained
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
            table.add_column(figure.column, justify="right", no_wrap=True)
        if trend is not None:
            table.add_column("trend", style="cyan")
        shown = list(rows) if len(rows) <= lines else list(rows)[: lines - 1]
        for name in shown:
            cells: list[RenderableType] = [_cell(figure, rows[name]) for figure in columns]
            if trend is not None:
                cells.append(Sparkline(self._view.trends[name, trend(rows[name])]))
            table.add_row(Text(self._plain_text(name)), *cells)
        if len(shown) < len(rows):
            table.add_row(Text(f"and {len(rows) - len(shown)} more", style="dim"))
        return table

    def _run_line(self, last: UpdateRecord) -> Text:
        view = self._view
        pairs = [
            (figure.column, _number(figures.run_value(last, figure.key), figure.unit))
            for figure in view.columns(figures.RUN_FIGURES)
        ]
        if view.tokens_per_s is not None:
            pairs.append(("tokens/s", Text(f"{view.tokens_per_s:,.0f}")))
        if view.saved_at is not None:
            pairs.append(("saved at", Text(str(view.saved_at))))
        return Text("   ", no_wrap=True, overflow="ellipsis").join(
            Text.assemble((f"{label} ", "dim"), value) for label, value in pairs
        )


class _CountAndTimes(ProgressColumn):
    """`64/256 responses  0:02`; for the run with an estimate of the time left."""

    def __init__(self, left_s: Callable[[], float | None]) -> None:
        super().__init__(_one_line())
        self._left_s = left_s

    def render(self, task: Task) -> Text:
        count = f"{int(task.completed):,}/{int(task.total):,} {task.fields['unit']}" if task.total else ""
        left = self._left_s() if task.fields["unit"] == "updates" and not task.finished else None
        rest = "" if left is None else f", about {clock_text(left)} left"
        return Text.assemble(count.rstrip(), (f"  {clock_text(task.elapsed or 0.0)}{rest}", "dim"))


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
